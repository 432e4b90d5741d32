"""Loss scaling for fp16 (Micikevicius et al. 2018, arXiv 1710.03740): gradients too small for its range are lifted."""

import math
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from megapoly.sections import PrecisionConfig


@dataclass
class LossScaler:
    """What multiplies the loss, and its rule, which is Megatron-LM's; 1 for ever where parameters are not in fp16.

    A step whose gradients overflow is not taken. The `hysteresis`th such step and each after it halve the scale, not
    below min_loss_scale; loss_scale_window steps in a row without overflow double it and restore the hysteresis. A
    fixed loss_scale stays, and only skips steps.
    """

    cfg: PrecisionConfig
    scale: float
    good_steps: int
    overflows_left: int
    skipped_steps: int = 0

    @classmethod
    def of(cls, cfg: PrecisionConfig) -> Self:
        """As it is at the start of a run."""
        return cls(cfg, (cfg.loss_scale or cfg.initial_loss_scale) if cfg.fp16 else 1.0, 0, cfg.hysteresis)

    def accepts(self, grad_norm: Tensor) -> bool:
        """Whether a step may be taken with gradients of this global norm, the same on every rank; moves the scale on.

        In fp16 the host waits here for the GPU, once a step: what comes next depends on the answer.
        """
        if not self.cfg.fp16:
            return True
        is_finite = math.isfinite(grad_norm.item())
        self.skipped_steps += not is_finite
        if self.is_dynamic:
            self._adapt(is_finite)
        return is_finite

    def _adapt(self, is_finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if is_finite else 0
        if not is_finite:
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.scale = max(self.scale / 2, self.cfg.min_loss_scale)
        elif self.good_steps == self.cfg.loss_scale_window:
            self.scale, self.good_steps, self.overflows_left = self.scale * 2, 0, self.cfg.hysteresis

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale moves."""
        return self.cfg.fp16 and self.cfg.loss_scale is None

    @property
    def expects_overflow(self) -> bool:
        """Whether gradients that are not finite are the rule's own way to find the scale: it can still fall."""
        return self.is_dynamic and self.scale > self.cfg.min_loss_scale

    def state(self) -> dict[str, int | float]:
        """What a checkpoint keeps of it: the steps skipped, and the place in the rule where there is one."""
        rule = {"scale": self.scale, "good_steps": self.good_steps, "overflows_left": self.overflows_left}
        return {"skipped_steps": self.skipped_steps} | (rule if self.is_dynamic else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; a scale that was not dynamic there, or is not here, begins anew."""
        self.skipped_steps = state["skipped_steps"]
        if self.is_dynamic and "scale" in state:
            self.scale, self.good_steps = state["scale"], state["good_steps"]
            self.overflows_left = state["overflows_left"]
