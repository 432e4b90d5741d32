"""Flat parameter and gradient buffers: what data-parallel reduction and the sharded optimizer work on.

All parameters of a rank lie in one contiguous buffer, decayed matrices first, and so do their fp32 main gradients.
Each data-parallel rank owns one equal range of it (ZeRO-1; Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megapoly.parallel.collectives import all_gather, all_reduce_, reduce_scatter
from megapoly.parallel.mesh import Axis, Mesh
from megapoly.parallel.tensor import Shard, sharded_parameters

ALIGNMENT = 64  # entries: every data-parallel rank's range begins on a cache line, for wide accesses of the optimizer


@dataclass(frozen=True)
class Segment:
    """One parameter in the flat buffer: entries begin to end. `is_counted`: this rank counts it in global norms."""

    name: str
    parameter: nn.Parameter
    shard: Shard
    begin: int
    end: int
    is_decayed: bool
    is_counted: bool


class FlatBuffers:
    """The parameters of a rank's part of a model, moved into one buffer, with fp32 main gradients beside it.

    A parameter's main gradient is also its attribute `main_grad`, for operations that add to it themselves.
    `tied`: the last stage holds a copy of the first one's embedding, and their gradients belong together.
    """

    def __init__(self, chunks: Sequence[nn.Module], mesh: Mesh, tied: bool) -> None:
        self.mesh, self.tied = mesh, tied
        named = list(sharded_parameters(*chunks))
        # Matrices decay, biases and norms do not. qkv and gated biases have several dimensions but are still biases.
        is_decayed = {name: not name.endswith("bias") and parameter.dim() > 1 for name, parameter, _ in named}
        named.sort(key=lambda entry: not is_decayed[entry[0]])
        self.segments: list[Segment] = []
        position = 0
        for name, parameter, shard in named:
            end = position + parameter.numel()
            counted = shard.dim is not None or mesh.tp.is_first
            if name == "embedding.word.weight" and not mesh.pp.is_first:
                counted = False  # the head's copy of a tied matrix; the first stage counts it
            self.segments.append(Segment(name, parameter, shard, position, end, is_decayed[name], counted))
            position = end
        self.num_decayed = max((s.end for s in self.segments if s.is_decayed), default=0)
        whole = mesh.dp.size * ALIGNMENT
        self.size = -(-position // whole) * whole
        first = self.segments[0].parameter
        self.params = torch.zeros(self.size, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(self.size, dtype=torch.float32, device=first.device)
        for segment in self.segments:
            view = self.params[segment.begin : segment.end].view_as(segment.parameter)
            view.copy_(segment.parameter.detach())
            segment.parameter.data = view
            segment.parameter.main_grad = self.main_grad(segment)  # type: ignore[attr-defined]
            segment.parameter.grad_added = lambda: None  # type: ignore[attr-defined]
            if segment.parameter.requires_grad:
                segment.parameter.register_post_accumulate_grad_hook(self._accumulator(segment))

    @property
    def owned(self) -> slice:
        """The range of the buffer whose optimizer state this data-parallel rank holds."""
        length = self.size // self.mesh.dp.size
        return slice(self.mesh.dp.rank * length, (self.mesh.dp.rank + 1) * length)

    def main_grad(self, segment: Segment) -> Tensor:
        """The fp32 gradient of a parameter, in its shape."""
        return self.grads[segment.begin : segment.end].view_as(segment.parameter)

    def _accumulator(self, segment: Segment) -> Callable[[Tensor], None]:
        main_grad = self.main_grad(segment)

        def accumulate(parameter: Tensor) -> None:
            if parameter.grad is not None:  # None where an operation has added to main_grad itself
                main_grad.add_(parameter.grad)
                parameter.grad = None

        return accumulate

    def zero_grad(self) -> None:
        """Begin a step."""
        self.grads.zero_()

    def reduce(self) -> Tensor:
        """Complete the gradients and sum them over data-parallel ranks; returns the owned range, fp32."""
        self._sum([s for s in self.segments if s.shard.is_partial], self.mesh.tp)
        if self.tied:
            self._sum([s for s in self.segments if s.name == "embedding.word.weight"], self.mesh.embedding)
        return reduce_scatter(self.grads, self.mesh.dp)

    def _sum(self, segments: list[Segment], axis: Axis) -> None:
        if axis.size == 1 or not segments:
            return
        together = torch.cat([self.grads[s.begin : s.end] for s in segments])
        all_reduce_(together, axis)
        for segment, summed in zip(segments, together.split([s.end - s.begin for s in segments]), strict=True):
            self.grads[segment.begin : segment.end] = summed

    def gather_params(self) -> None:
        """Take every owner's updated range of the parameters."""
        if self.mesh.dp.size > 1:
            self.params.copy_(all_gather(self.params[self.owned].clone(), self.mesh.dp))
