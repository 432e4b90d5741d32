"""The optimizer: state sharded over data-parallel ranks (ZeRO-1; Rajbhandari et al. 2020, arXiv 1910.02054).

AdamW updates everything, or with Muon what is no matrix of a block.
"""

import itertools
import math

import torch
from megapoly_kernels import Range, RangeTable, adamw_, merged
from torch import Tensor

from megapoly.optim.arrears import Arrears
from megapoly.optim.clip import GlobalNorm
from megapoly.optim.groups import Rules
from megapoly.optim.muon import Muon
from megapoly.optim.spans import Portion, Span, spans_of
from megapoly.parallel.gradients import FlatBuffers


def update_ranges(span: Span, rules: Rules) -> list[Range]:
    """What of a span is trained, from its begin on, with decay and rate; frozen parameters are left out.

    Matrices and the others stay apart where neither decays as well: the last bits of torch's AdamW on a CPU depend on
    where a range ends, and a run should not change with how its ranges merge.
    """
    ranges: list[Range] = []
    trained = (s for s in span.segments if s.parameter.requires_grad)
    for _, group in itertools.groupby(trained, lambda s: s.is_decayed):
        ranges += merged(
            [
                Range(
                    s.owned[0] - span.begin, s.owned[1] - span.begin,
                    rules.weight_decay(s.name, s.shard.shape), rules.lr_scale(s.name, s.shard.shape),
                )
                for s in group
            ]
        )  # fmt: skip
    return ranges


class ShardedOptimizer:
    """fp32 master weights, moments and momentum of this rank's shard of the flat buffers.

    Where the shard is the whole buffer, in fp32, the master weights are the parameters themselves. Which parameters are
    frozen is read from requires_grad once, here. `backend`: triton or torch (default: triton on a GPU, torch on a CPU).
    """

    def __init__(self, buffers: FlatBuffers, rules: Rules, backend: str | None = None) -> None:
        self.buffers, self.rules, self.backend = buffers, rules, backend
        self.has_own_master = buffers.mesh.shards.size > 1 or buffers.params.dtype != torch.float32
        self.master = buffers.params
        if self.has_own_master:
            self.master = torch.cat([buffers.params[bucket.part] for bucket in buffers.buckets]).float()
        spans, device = spans_of(buffers, rules), self.master.device
        self.adamw_spans = [span for span in spans if not span.uses_muon]
        self.exp_avg, self.exp_avg_sq = (Portion(self.adamw_spans, device) for _ in range(2))
        self.ranges = [RangeTable.build(update_ranges(span, rules), device) for span in self.adamw_spans]
        self.momentum = Portion([span for span in spans if span.uses_muon], device)
        self.muon = Muon(buffers, rules)
        self.global_norm = GlobalNorm(buffers, backend)
        self._num_steps = 0
        self._last_scale: Arrears | None = None

    @property
    def num_steps(self) -> int:
        """Updates that were made; on a GPU the host waits here for the last step's verdict."""
        if self._last_scale is not None:
            self._num_steps -= math.isnan(self._last_scale.read()[0])
            self._last_scale = None
        return self._num_steps

    @num_steps.setter
    def num_steps(self, number: int) -> None:
        self._num_steps, self._last_scale = number, None

    def reset(self) -> None:
        """Begin anew: moments and momentum are zero, the next step is the first; master weights stay."""
        for portion in (self.exp_avg, self.exp_avg_sq, self.momentum):
            portion.flat.zero_()
        self.num_steps = 0

    @torch.no_grad()
    def step(self, owned_grad: Tensor, lr: float, scale: Tensor | None = None) -> None:
        """One update from this rank's shard of the summed gradients, times `scale` (a scalar on the device).

        Where `scale` is NaN, on every rank alike, there is none: weights, moments and num_steps stay. The host learns
        that a step later, when it has given the device the next step's passes to do.
        Bucket by bucket, those that the next forward pass needs first come first; while one is updated, the parameters
        of those before it are gathered. What owned_grad holds then is not defined.
        """
        self.num_steps += 1
        self._last_scale = None if scale is None else Arrears(scale)
        self.buffers.wait_params()
        self.muon.directions_(self.momentum, owned_grad, scale)
        for bucket in reversed(self.buffers.buckets):
            for span, ranges in zip(self.adamw_spans, self.ranges, strict=True):
                if span.bucket is bucket:
                    self._adamw(span, ranges, owned_grad, lr, scale)
            self.muon.update_(bucket, self.master, owned_grad, lr, scale)
            if self.has_own_master and bucket in self.muon.buckets:
                self.buffers.params[bucket.part].copy_(self.master[bucket.owned])
            self.buffers.start_gather(bucket)

    def _adamw(self, span: Span, ranges: RangeTable, owned_grad: Tensor, lr: float, scale: Tensor | None) -> None:
        own, o = slice(span.begin, span.end), self.rules.optimizer
        adamw_(
            self.master[own], owned_grad[own], self.exp_avg.of(span), self.exp_avg_sq.of(span), self._num_steps, ranges,
            lr=lr, beta1=o.adam_beta1, beta2=o.adam_beta2, eps=o.adam_eps, scale=scale,
            params=self.buffers.params[span.params] if self.has_own_master else None, backend=self.backend,
        )  # fmt: skip

    @torch.no_grad()
    def refresh_params(self) -> None:
        """Bring the parameters of all ranks in line with the master weights."""
        self.buffers.wait_params()
        for bucket in reversed(self.buffers.buckets):
            if self.has_own_master:
                self.buffers.params[bucket.part].copy_(self.master[bucket.owned])
            self.buffers.start_gather(bucket)
