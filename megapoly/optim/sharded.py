"""AdamW whose state is sharded over data-parallel ranks (ZeRO-1; Rajbhandari et al. 2020, arXiv 1910.02054)."""

import torch
from megapoly_kernels import adamw_
from torch import Tensor

from megapoly.config import OptimizerConfig
from megapoly.parallel.gradients import FlatBuffers


class ShardedAdamW:
    """fp32 master weights and moments of the range of the flat buffer that this rank owns.

    With fp32 parameters the master weights are the parameters themselves.
    """

    def __init__(self, buffers: FlatBuffers, cfg: OptimizerConfig) -> None:
        self.buffers, self.cfg = buffers, cfg
        owned_params = buffers.params[buffers.owned]
        self.has_own_master = owned_params.dtype != torch.float32
        self.master = owned_params.float() if self.has_own_master else owned_params
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.num_steps = 0

    @torch.no_grad()
    def step(self, owned_grad: Tensor, lr: float) -> None:
        """One update from this rank's range of the summed (and clipped) gradients; parameters are gathered after."""
        self.num_steps += 1
        c = self.cfg
        border = max(0, min(self.buffers.num_decayed - self.buffers.owned.start, len(self.master)))
        for part, weight_decay in ((slice(0, border), c.weight_decay), (slice(border, None), 0.0)):
            if len(self.master[part]):
                adamw_(
                    self.master[part], owned_grad[part], self.exp_avg[part], self.exp_avg_sq[part], self.num_steps,
                    lr=lr, beta1=c.adam_beta1, beta2=c.adam_beta2, eps=c.adam_eps, weight_decay=weight_decay,
                )  # fmt: skip
        self.refresh_params()

    @torch.no_grad()
    def refresh_params(self) -> None:
        """Bring the parameters of all ranks in line with the master weights."""
        if self.has_own_master:
            self.buffers.params[self.buffers.owned].copy_(self.master)
        self.buffers.gather_params()
