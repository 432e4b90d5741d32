"""Muon: momentum, orthogonalised matrix by matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

State is sharded over the replicas entry by entry, but an update needs whole matrices. So momentum is kept and advanced
where it is owned, gathered, and the matrices are dealt out over the shards; what each makes goes back to the owners.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megapoly.optim.groups import Rules
from megapoly.optim.spans import Portion
from megapoly.parallel.buckets import Bucket
from megapoly.parallel.collectives import reduce_scatter, start_all_gather
from megapoly.parallel.gradients import FlatBuffers
from megapoly.parallel.tensor import Shard

# Jordan et al.: five steps bring singular values between 0.002 and 1 to between 0.68 and 1.21, not to 1 exactly; that
# is no harm, and the steep slope at 0 spares many steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """About the orthogonal factor U V^T of x = U S V^T, by a quintic iteration on x / ||x||; zero where x is.

    x is [rows, columns]; all products are in its type.
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def matrices(weight: Tensor) -> Iterator[Tensor]:
    """Views of the matrices that a whole parameter packs, each [.., columns]: rows are all dimensions but the last.

    [groups, queries + 2, head_dim, hidden] holds all heads' queries, their keys and their values, [2, ffn, hidden] gate
    and up-projection.
    """
    if weight.dim() == 4:
        queries = weight.shape[1] - 2
        yield from (weight[:, :queries], weight[:, queries], weight[:, queries + 1])
    elif weight.dim() == 3:
        yield from weight.unbind()
    else:
        yield weight


def orthogonalize_(weight: Tensor, steps: int, scale: float) -> None:
    """Put in place of each packed matrix its orthogonal factor times scale x sqrt(its larger side).

    Then its entries' root mean square is about `scale`, whatever the shape (Liu et al. 2025, arXiv 2502.16982).
    """
    for part in matrices(weight):
        flat = part.flatten(0, -2)
        part.copy_(newton_schulz(flat, steps).view_as(part) * (scale * math.sqrt(max(flat.shape))))


def whole_of(parts: Tensor, shards: Sequence[Shard], kv: int) -> Tensor:
    """A whole parameter from all tensor-parallel ranks' parts of it, [ranks, ..]; `shards` are this rank's.

    Where groups of kv ranks share key/value heads, each of them holds a part of the queries and the same keys and
    values.
    """
    if len(shards) == 1:
        dim = shards[0].dim
        return parts[0].clone() if dim is None else torch.cat(parts.unbind(), dim)
    row = shards[1].row
    parts = parts.flatten(0, 1).unflatten(0, (-1, kv))  # [groups, ranks that share one, queries + 2, ..]
    return torch.cat([parts[:, :, :row].flatten(1, 2), parts[:, 0, row:]], dim=1)


def flops(shape: tuple[int, ...]) -> int:
    """About what newton_schulz costs for a parameter: three products a step, two of the smaller side's squares."""
    matrix = [(math.prod(part.shape[:-1]), part.shape[-1]) for part in matrices(torch.empty(shape, device="meta"))]
    return sum(min(m) ** 2 * (2 * max(m) + min(m)) for m in matrix)


def deal(costs: Sequence[int], hands: int) -> list[int]:
    """For each item the hand that takes it: the dearest first, each to the hand with least so far (ties: the first)."""
    loads, taken = [0] * hands, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        taken[item] = loads.index(min(loads))
        loads[taken[item]] += costs[item]
    return taken


def _unless_nan(scale: Tensor, value: float, instead: float) -> Tensor:
    """A value, or another where `scale` is NaN, as a scalar on the device."""
    return torch.where(scale.isnan(), instead, value)


class Muon:
    """Momentum of this rank's shard of the blocks' matrices, and their updates.

    Nesterov's momentum, decoupled weight decay. Products are in bf16 on a GPU, as is what travels, and in fp32 on a
    CPU, which has no faster one. Tensor-parallel ranks all compute what they share. Frozen matrices are left out.
    """

    def __init__(self, buffers: FlatBuffers, rules: Rules) -> None:
        self.buffers, self.rules = buffers, rules
        self.dtype = torch.bfloat16 if buffers.params.is_cuda else torch.float32
        trained = [s for s in buffers.segments if s.parameter.requires_grad]
        segments = [s for s in trained if rules.uses_muon(s.name, s.shard.shape)]
        self.held = [s for s in segments if s.owned[0] < s.owned[1]]
        self.buckets = [b for b in buffers.buckets if any(s.bucket is b for s in segments)]
        self.parameters = [list(shards) for _, shards in itertools.groupby(segments, lambda s: s.name)]
        self.hands = deal([flops(shards[0].shard.shape) for shards in self.parameters], buffers.mesh.shards.size)

    @torch.no_grad()
    def directions_(self, momentum: Portion, owned_grad: Tensor, scale: Tensor | None) -> None:
        """Turn the matrices' entries of the gradient's shard, times `scale`, into those of their updates.

        Momenta stay as they are where `scale` is NaN; what the directions are then is not defined.
        """
        grads = [owned_grad[slice(*s.owned)] for s in self.held]
        momenta = [momentum.of(s) for s in self.held]
        beta = self.rules.optimizer.muon_momentum
        if grads:
            if scale is not None:
                torch._foreach_mul_(grads, scale.float())
                for grad in grads:
                    grad.masked_fill_(scale.isnan(), 0.0)
            torch._foreach_mul_(momenta, beta if scale is None else _unless_nan(scale, beta, 1.0))
            torch._foreach_add_(momenta, grads)
            torch._foreach_add_(grads, momenta, alpha=beta)
        is_whole = self.buffers.mesh.shards.size == 1
        flat = owned_grad if is_whole else self._gathered(owned_grad)
        self._orthogonalize(flat)
        if not is_whole:
            self._give_back(flat, owned_grad)

    def _gathered(self, owned_grad: Tensor) -> Tensor:
        """All entries, laid out in the gradients' buffer, which is free once they have been summed."""
        for bucket in self.buckets:
            part = owned_grad[bucket.owned].to(self.dtype)
            self.buffers.grads[bucket.flat].copy_(self.buffers.gather_flat(bucket, part))
        return self.buffers.grads

    def _orthogonalize(self, flat: Tensor) -> None:
        """Updates in place of momenta, for the parameters that this shard was dealt; the others become zero."""
        o, mesh = self.rules.optimizer, self.buffers.mesh
        mine = []
        for segments, hand in zip(self.parameters, self.hands, strict=True):
            local = flat[segments[0].begin : segments[-1].end].view_as(segments[0].parameter)
            if hand == mesh.shards.rank:
                parts = start_all_gather(local.to(self.dtype)[None], mesh.tp)
                mine.append(([s.shard for s in segments], local, parts))
            else:
                local.zero_()
        for shards, local, parts in mine:
            whole = whole_of(parts.wait(), shards, mesh.kv.size)
            orthogonalize_(whole, o.muon_num_ns_steps, o.muon_scale)
            for shard in shards:
                box = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))
                shard.held(local).copy_(whole[box])

    def _give_back(self, flat: Tensor, owned_grad: Tensor) -> None:
        """Each entry was made by one shard: their sum brings it to its owner."""
        for bucket in self.buckets:
            part = reduce_scatter(flat[bucket.flat].to(self.dtype), self.buffers.mesh.shards)
            for segment in self.held:
                if segment.bucket is bucket:
                    begin, end = segment.owned
                    owned_grad[begin:end].copy_(part[begin - bucket.owned.start : end - bucket.owned.start])

    @torch.no_grad()
    def update_(self, bucket: Bucket, master: Tensor, directions: Tensor, lr: float, scale: Tensor | None) -> None:
        """Decay the matrices' master weights of a bucket and step against their directions; not where scale is NaN."""
        for segment in self.held:
            if segment.bucket is bucket:
                name, shape = segment.name, segment.shard.shape
                rate, weights = lr * self.rules.lr_scale(name, shape), master[slice(*segment.owned)]
                keep, direction = 1.0 - rate * self.rules.weight_decay(name, shape), directions[slice(*segment.owned)]
                if scale is not None:
                    direction.masked_fill_(scale.isnan(), 0.0)
                weights.mul_(keep if scale is None else _unless_nan(scale, keep, 1.0))
                weights.add_(direction, alpha=-rate)
