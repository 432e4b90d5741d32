"""A matrix that is embedding and head at once, where all pipeline ranks share the head (model/head.py).

It is one parameter, of which each rank of `vocab` holds its rows, with their gradient and their optimizer state, as of
any head that is shared. The embedding is on the first pipeline rank alone, which looks up in a copy: gathered from the
pipeline ranks before it is used, while what it gets of gradients is dealt out to them after the last backward pass.
"""

import dataclasses

import torch
from torch import Tensor, nn

from megapoly.parallel.collectives import gather_to_first_, scatter_from_first_
from megapoly.parallel.mesh import Axis
from megapoly.parallel.tensor import Placement, looked_up, sharded_parameter


class WordCopy(nn.Module):
    """The embedding's copy of a tied matrix: the rows of this rank and of those behind it in the pipeline.

    The rank of number p in the pipeline of P and t of T tensor-parallel ones holds stretch pT + t of the vocabulary,
    whose length is that of `part`. So `rows` [P x stretch, hidden] are every T-th stretch, from the t-th on. `gradient`
    is fp32, in their shape.
    """

    def __init__(self, part: nn.Parameter, pipeline_ranks: int, place: Placement) -> None:
        super().__init__()
        self.place, self.stretch = place, len(part)
        rows = part.new_zeros((pipeline_ranks * len(part), *part.shape[1:]))
        self.rows = rows.requires_grad_()  # no parameter: neither saved nor updated
        self.gradient = torch.zeros_like(rows, dtype=torch.float32)
        self.rows.register_post_accumulate_grad_hook(self._accumulate)

    def _accumulate(self, rows: Tensor) -> None:
        assert rows.grad is not None
        self.gradient.add_(rows.grad)
        rows.grad = None

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Token ids [tokens] -> [tokens or this rank's tokens, hidden]."""
        tp, stretch_T = self.place.tp, tokens_T // self.stretch
        local_T = stretch_T // tp.size * self.stretch + tokens_T % self.stretch
        return looked_up(self.rows, local_T, stretch_T % tp.size == tp.rank, self.place)


class TiedMatrix(nn.Module):
    """This rank's rows of the matrix, [vocabulary rows, hidden], and on the first pipeline rank the embedding's copy.

    `shape` and `padded` are as in sharded_parameter; `vocab` places the rows, `place` what is looked up.
    """

    def __init__(self, shape: tuple[int, int], padded: int, vocab: Axis, pp: Axis, place: Placement) -> None:
        super().__init__()
        self.pp = pp
        self.weight = sharded_parameter(shape, 0, dataclasses.replace(place, tp=vocab), "normal", padded=padded)
        self.copy = WordCopy(self.weight, pp.size, place) if pp.is_first else None

    @torch.no_grad()
    def forward(self) -> None:
        """Bring the copy up to date; all pipeline ranks call it together, as a module, which waits for the weight."""
        gather_to_first_(None if self.copy is None else self.copy.rows, self.weight, self.pp)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copy's gradient of a step to the main gradients of its rows; all pipeline ranks call it together."""
        main_grad: Tensor = self.weight.main_grad  # type: ignore[attr-defined]
        gradient = None if self.copy is None else self.copy.gradient
        main_grad.add_(scatter_from_first_(torch.empty_like(main_grad), gradient, self.pp))
        if gradient is not None:
            gradient.zero_()
