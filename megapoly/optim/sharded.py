"""AdamW whose state is sharded over data-parallel ranks (ZeRO-1; Rajbhandari et al. 2020, arXiv 1910.02054)."""

import torch
from megapoly_kernels import Range, RangeTable, adamw_, merged
from torch import Tensor

from megapoly.optim.clip import GlobalNorm, owned_part
from megapoly.parallel.gradients import FlatBuffers
from megapoly.sections import OptimizerConfig


def update_ranges(buffers: FlatBuffers, weight_decay: float) -> list[Range]:
    """What of the owned range is trained, with its decay; parameters that require no gradient are left out.

    The decayed and the others stay apart where weight_decay is 0 as well: the last bits of torch's AdamW on a CPU
    depend on where a range ends, and a run should not change with how its ranges merge.
    """
    trained = [s for s in buffers.segments if s.parameter.requires_grad]
    decayed = [Range(*owned_part(s, buffers.owned), weight_decay) for s in trained if s.is_decayed]
    others = [Range(*owned_part(s, buffers.owned)) for s in trained if not s.is_decayed]
    return merged(decayed) + merged(others)


class ShardedAdamW:
    """fp32 master weights and moments of the range of the flat buffer that this rank owns.

    With fp32 parameters the master weights are the parameters themselves. Which parameters are frozen is read from
    requires_grad once, here. `backend`: triton or torch (default: triton on a GPU, torch on a CPU).
    """

    def __init__(self, buffers: FlatBuffers, cfg: OptimizerConfig, backend: str | None = None) -> None:
        self.buffers, self.cfg, self.backend = buffers, cfg, backend
        owned_params = buffers.params[buffers.owned]
        self.has_own_master = owned_params.dtype != torch.float32
        self.master = owned_params.float() if self.has_own_master else owned_params
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.ranges = RangeTable.build(update_ranges(buffers, cfg.weight_decay), self.master.device)
        self.global_norm = GlobalNorm(buffers, backend)
        self.num_steps = 0

    @torch.no_grad()
    def step(self, owned_grad: Tensor, lr: float, scale: Tensor | None = None) -> None:
        """One update from this rank's range of the summed gradients, times `scale` (a scalar on the device).

        Parameters are gathered after. What owned_grad holds then is not defined.
        """
        self.num_steps += 1
        c = self.cfg
        adamw_(
            self.master, owned_grad, self.exp_avg, self.exp_avg_sq, self.num_steps, self.ranges,
            lr=lr, beta1=c.adam_beta1, beta2=c.adam_beta2, eps=c.adam_eps, scale=scale,
            params=self.buffers.params[self.buffers.owned] if self.has_own_master else None, backend=self.backend,
        )  # fmt: skip
        self.buffers.gather_params()

    @torch.no_grad()
    def refresh_params(self) -> None:
        """Bring the parameters of all ranks in line with the master weights."""
        if self.has_own_master:
            self.buffers.params[self.buffers.owned].copy_(self.master)
        self.buffers.gather_params()
