"""Global norms over all axes, each parameter counted once."""

import torch
from torch import Tensor

from megapoly.parallel.collectives import all_reduce_
from megapoly.parallel.gradients import FlatBuffers


def global_norm(owned: Tensor, buffers: FlatBuffers) -> Tensor:
    """L2 norm of a flat quantity whose owned range this rank holds (fp32), over the whole model; fp64 scalar.

    Parameters that tensor-parallel ranks hold alike count on the first of them, a tied matrix on the first stage.
    """
    start, stop = buffers.owned.start, buffers.owned.stop
    parts = [
        owned[max(s.begin, start) - start : min(s.end, stop) - start]
        for s in buffers.segments
        if s.is_counted and s.begin < stop and s.end > start
    ]
    total = torch.zeros((), dtype=torch.float64, device=owned.device)
    if parts:
        total = torch.stack(torch._foreach_norm(parts)).double().square().sum()
    return all_reduce_(total, buffers.mesh.world).sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Factor that brings gradients of this norm to at most max_norm (Pascanu et al. 2013); 1 where max_norm is 0."""
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
