"""Weight gradients that can wait: the slot W of zero-bubble schedules (Qi et al. 2024, arXiv 2401.10241)."""

import contextlib
from collections.abc import Callable, Iterator

import torch


class WeightGradients:
    """Where the linear layers of a rank leave their weight gradients: computed at once, or kept for later.

    A layer's backward pass computes the gradient of its input itself and hands the other one in as a function that adds
    it to the weight's main gradient. So fused backward passes run once, whatever the schedule.
    """

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] | None = None

    @property
    def is_open(self) -> bool:
        """Whether weight gradients are kept for later."""
        return self._waiting is not None

    def add(self, compute: Callable[[], None]) -> None:
        """Compute a weight gradient now, or keep it where `deferred` is open."""
        if self._waiting is None:
            compute()
        else:
            self._waiting.append(torch.no_grad()(compute))  # no backward pass keeps autograd from recording it

    @contextlib.contextmanager
    def deferred(self) -> Iterator[list[Callable[[], None]]]:
        """While open, weight gradients are kept in the list yielded; the caller runs them, in order, once."""
        waiting: list[Callable[[], None]] = []
        self._waiting = waiting
        try:
            yield waiting
        finally:
            self._waiting = None
