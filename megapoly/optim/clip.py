"""Global norms over all axes, each parameter counted once."""

import torch
from megapoly_kernels import Range, RangeTable, merged, squared_norm
from torch import Tensor

from megapoly.parallel.collectives import all_reduce_
from megapoly.parallel.gradients import FlatBuffers


class GlobalNorm:
    """L2 norms of flat quantities over the whole model.

    Parameters that tensor-parallel ranks hold alike count on the first of them, a tied matrix on the first stage,
    shards on the first of their instances, and what is frozen (does not require a gradient at construction) nowhere.
    """

    def __init__(self, buffers: FlatBuffers, backend: str | None = None) -> None:
        self.backend, self.world = backend, buffers.mesh.world
        counted = [s for s in buffers.segments if s.is_counted and s.parameter.requires_grad]
        ranges = merged([Range(*s.owned) for s in counted])
        self.ranges = RangeTable.build(ranges, buffers.params.device)

    @torch.no_grad()
    def __call__(self, owned: Tensor) -> Tensor:
        """The norm of a flat fp32 quantity whose shard this rank holds; fp64 scalar, the same on every rank."""
        return all_reduce_(squared_norm(owned, self.ranges, self.backend), self.world).sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Factor that brings gradients of this norm to at most max_norm (Pascanu et al. 2013); 1 where max_norm is 0."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
