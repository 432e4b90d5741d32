"""AdamW whose state is sharded over data-parallel ranks (ZeRO-1; Rajbhandari et al. 2020, arXiv 1910.02054)."""

import torch
from megapoly_kernels import Range, RangeTable, adamw_, merged
from torch import Tensor

from megapoly.optim.clip import GlobalNorm
from megapoly.parallel.buckets import Bucket
from megapoly.parallel.gradients import FlatBuffers
from megapoly.sections import OptimizerConfig


def update_ranges(buffers: FlatBuffers, bucket: Bucket, weight_decay: float) -> list[Range]:
    """What of this rank's part of a bucket is trained, with its decay; frozen parameters are left out.

    The decayed and the others stay apart where weight_decay is 0 as well: the last bits of torch's AdamW on a CPU
    depend on where a range ends, and a run should not change with how its ranges merge.
    """
    trained = [s for s in buffers.segments if s.bucket is bucket and s.parameter.requires_grad]
    first = bucket.owned.start

    def ranges(is_decayed: bool, weight_decay: float) -> list[Range]:
        ends = [s.owned for s in trained if s.is_decayed == is_decayed]
        return merged([Range(begin - first, end - first, weight_decay) for begin, end in ends])

    return ranges(True, weight_decay) + ranges(False, 0.0)


class ShardedAdamW:
    """fp32 master weights and moments of this rank's shard of the flat buffers.

    Where the shard is the whole buffer, in fp32, the master weights are the parameters themselves. Which parameters are
    frozen is read from requires_grad once, here. `backend`: triton or torch (default: triton on a GPU, torch on a CPU).
    """

    def __init__(self, buffers: FlatBuffers, cfg: OptimizerConfig, backend: str | None = None) -> None:
        self.buffers, self.cfg, self.backend = buffers, cfg, backend
        self.has_own_master = buffers.mesh.shards.size > 1 or buffers.params.dtype != torch.float32
        self.master = buffers.params
        if self.has_own_master:
            self.master = torch.cat([buffers.params[bucket.part] for bucket in buffers.buckets]).float()
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        ranges = [update_ranges(buffers, bucket, cfg.weight_decay) for bucket in buffers.buckets]
        self.ranges = [RangeTable.build(of_bucket, self.master.device) for of_bucket in ranges]
        self.global_norm = GlobalNorm(buffers, backend)
        self.num_steps = 0

    @torch.no_grad()
    def step(self, owned_grad: Tensor, lr: float, scale: Tensor | None = None) -> None:
        """One update from this rank's shard of the summed gradients, times `scale` (a scalar on the device).

        Bucket by bucket, those that the next forward pass needs first come first; while one is updated, the parameters
        of those before it are gathered. What owned_grad holds then is not defined.
        """
        self.num_steps += 1
        self.buffers.wait_params()
        c = self.cfg
        for bucket in reversed(self.buffers.buckets):
            own = bucket.owned
            adamw_(
                self.master[own], owned_grad[own], self.exp_avg[own], self.exp_avg_sq[own], self.num_steps,
                self.ranges[bucket.number], lr=lr, beta1=c.adam_beta1, beta2=c.adam_beta2, eps=c.adam_eps, scale=scale,
                params=self.buffers.params[bucket.part] if self.has_own_master else None, backend=self.backend,
            )  # fmt: skip
            self.buffers.start_gather(bucket)

    @torch.no_grad()
    def refresh_params(self) -> None:
        """Bring the parameters of all ranks in line with the master weights."""
        self.buffers.wait_params()
        for bucket in reversed(self.buffers.buckets):
            if self.has_own_master:
                self.buffers.params[bucket.part].copy_(self.master[bucket.owned])
            self.buffers.start_gather(bucket)
