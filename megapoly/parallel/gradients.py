"""Flat parameter and gradient buffers: what data-parallel reduction and the sharded optimizer work on.

All parameters of a rank lie in one contiguous buffer of buckets, and so do their fp32 main gradients. A bucket's
gradients are summed over the replicas as soon as the step's last one has come in, while the backward pass goes on, and
its updated parameters are gathered while the next step begins (Li et al. 2020, arXiv 2006.15704; Rajbhandari et al.
2020, arXiv 1910.02054).

No order of collectives can wait for itself: replicas run the same program on equal layouts and start their buckets in
the order of the buckets, whatever the order of the gradients. Seen from the pipeline and the tensor-parallel ranks, a
reduction is therefore one more local operation between two actions, at the same place on all replicas. That also holds
where one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) runs the collectives of all groups in the order of their issue.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from megapoly.parallel.buckets import WORD, Bucket, Segment, group, lay_out
from megapoly.parallel.collectives import (
    Pending,
    all_reduce_,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
)
from megapoly.parallel.mesh import Axis, Mesh
from megapoly.parallel.tensor import sharded_parameters
from megapoly.sections import ParallelConfig


class FlatBuffers:
    """The parameters of a rank's chunks of the model, moved into one buffer, with fp32 main gradients beside it.

    Each parameter gets two attributes. `main_grad` is its fp32 gradient, in its shape; what autograd delivers is added
    to it by a hook. `grad_added()` is called by whoever else adds to it, once a micro-batch, after adding.
    `tied`: the first and the last rank of the pipeline hold a copy of one matrix, and their gradients belong together.
    `wire`: type in which gradients travel over the replicas; they are accumulated over micro-batches in fp32 anyway.
    With one replica everything is one bucket.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], mesh: Mesh, tied: bool, cfg: ParallelConfig,
        wire: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.mesh, self.tied, self.cfg, self.wire = mesh, tied, cfg, wire
        named = list(sharded_parameters(*chunks))
        is_alone = mesh.replicas.size == 1
        self.buckets, self.segments = lay_out([named] if is_alone else group(named, cfg.ddp_bucket_size), mesh, tied)
        self.size = self.buckets[-1].flat.stop
        first = self.segments[0].parameter
        self.params = torch.zeros(self.size, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(self.size, dtype=torch.float32, device=first.device)
        self.owned_grads = self.grads if mesh.shards.size == 1 else self.grads.new_zeros(self.size // mesh.shards.size)
        is_early = cfg.overlap_grad_reduce and not is_alone
        self._num_early = len({s.bucket.number for s in self.segments if s.name != WORD}) if is_early else 0
        self._missing: list[int] = []
        self._reductions: list[Pending] = []
        self._gathers: dict[int, Pending] = {}
        is_chained = mesh.shards.size > 1 and mesh.instances.size > 1 and mesh.device.type == "cuda"
        self._stream = torch.cuda.Stream() if is_chained else None
        self._partial = self._owned_views([s for s in self.segments if s.shard.is_partial])
        self._tied = self._owned_views([s for s in self.segments if tied and s.name == WORD])
        self._copied = self._owned_views([s for s in self.segments if s.shard.is_copied])
        for _, parts in itertools.groupby(self.segments, key=lambda s: id(s.parameter)):
            self._adopt(list(parts))
        if cfg.overlap_param_gather and mesh.shards.size > 1:
            for chunk in chunks:
                self._wait_before_use(chunk)

    def _adopt(self, parts: Sequence[Segment]) -> None:
        """Move a parameter into the buffer and give it its gradient."""
        parameter, flat = parts[0].parameter, slice(parts[0].begin, parts[-1].end)
        view = self.params[flat].view_as(parameter)
        view.copy_(parameter.detach())
        parameter.data = view
        main_grad = self.grads[flat].view_as(parameter)
        grad_added = self._counter(parts[0].bucket)
        parameter.main_grad = main_grad  # type: ignore[attr-defined]
        parameter.grad_added = grad_added  # type: ignore[attr-defined]

        def accumulate(parameter: Tensor) -> None:
            if parameter.grad is not None:  # None where an operation adds to main_grad itself
                main_grad.add_(parameter.grad)
                parameter.grad = None
                grad_added()

        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(accumulate)

    def _owned_views(self, segments: Sequence[Segment]) -> list[Tensor]:
        return [self.owned_grads[slice(*s.owned)] for s in segments if s.owned[0] < s.owned[1]]

    # Gradients

    def begin(self, num_microbatches: int) -> None:
        """Begin a step, in which every trained parameter will get so many gradients."""
        self.grads.zero_()
        self._reductions = []
        self._missing = [0] * len(self.buckets)
        for segment in self.segments:
            if segment.parameter.requires_grad and segment.shard.row == 0:
                self._missing[segment.bucket.number] += num_microbatches

    def _counter(self, bucket: Bucket) -> Callable[[], None]:
        def grad_added() -> None:
            self._missing[bucket.number] -= 1
            assert self._missing[bucket.number] >= 0, f"a gradient of bucket {bucket.number} came after its reduction"
            while len(self._reductions) < self._num_early and not self._missing[len(self._reductions)]:
                self._start(self.buckets[len(self._reductions)])

        return grad_added if bucket.number < self._num_early else lambda: None

    def _start(self, bucket: Bucket) -> None:
        """Start summing a bucket: over the shards, each of which keeps its part, then these over the instances."""
        shards, instances = self.mesh.shards, self.mesh.instances
        sent = self.grads[bucket.flat].to(self.wire)
        part = self.owned_grads[bucket.owned] if self.wire == torch.float32 and shards.size > 1 else None
        with self._chain():
            pending = start_reduce_scatter(sent, shards, part)
            if instances.size > 1:
                # `sent` stays: on a GPU this side stream has waited for it, not the one that would reuse its memory.
                pending = start_all_reduce_(pending.wait(), instances, keep=sent)
        self._reductions.append(pending)

    @contextlib.contextmanager
    def _chain(self) -> Iterator[None]:
        """On a GPU, a stream where one collective can wait for another while the computation goes on."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def finish(self) -> Tensor:
        """Complete the step's gradients, summed over everyone; returns this rank's shard of them, fp32."""
        if self.mesh.replicas.size > 1:
            for bucket in self.buckets[len(self._reductions) :]:
                self._start(bucket)
            for bucket, pending in zip(self.buckets, self._reductions, strict=True):
                part = pending.wait()
                if self.wire != torch.float32:
                    self.owned_grads[bucket.owned].copy_(part)
            self._reductions = []
        _sum_together(self._partial, self.mesh.tp)
        _sum_together(self._copied, self.mesh.kv)
        _sum_together(self._tied, self.mesh.embedding)
        return self.owned_grads

    # Parameters

    def start_gather(self, bucket: Bucket) -> None:
        """Take every owner's updated part of a bucket; modules wait for it before they are used."""
        if self.mesh.shards.size > 1:
            whole, part = self.params[bucket.flat], self.params[bucket.part]
            self._gathers[bucket.number] = start_all_gather(part, self.mesh.shards, whole)
        if not self.cfg.overlap_param_gather:
            self.wait_params()

    def wait_params(self) -> None:
        """Wait until the parameters are whole; for everyone who reads them otherwise than through their modules."""
        self._wait(tuple(self._gathers))

    def _wait(self, numbers: Sequence[int]) -> None:
        if self._gathers:
            for number in numbers:
                if (pending := self._gathers.pop(number, None)) is not None:
                    pending.wait()

    def _wait_before_use(self, chunk: nn.Module) -> None:
        """Let each block wait for its own buckets; what follows the chunk (the loss on its head), for all of them."""
        number_of = {id(s.parameter): s.bucket.number for s in self.segments}
        everything = sorted({number_of[id(parameter)] for parameter in chunk.parameters()})
        for unit in _units(chunk):
            numbers = sorted({number_of[id(parameter)] for parameter in unit.parameters()})
            unit.register_forward_pre_hook(lambda *_, numbers=numbers: self._wait(numbers))
        chunk.register_forward_hook(lambda *_: self._wait(everything))

    def gather_flat(self, bucket: Bucket, part: Tensor) -> Tensor:
        """All entries of a bucket of a flat quantity, in the layout of `params`, from every owner's part of it."""
        return start_all_gather(part, self.mesh.shards).wait()

    def own_part(self, bucket: Bucket, whole: Tensor) -> Tensor:
        """What this rank owns of all entries of a bucket; the reverse of gather_flat."""
        return whole[bucket.part.start - bucket.flat.start : bucket.part.stop - bucket.flat.start]


def _sum_together(views: Sequence[Tensor], axis: Axis) -> None:
    if axis.size == 1 or not views:
        return
    together = all_reduce_(torch.cat(list(views)), axis)
    torch._foreach_copy_(list(views), together.split([len(view) for view in views]))


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules within a module that are called as such: containers only hold others."""
    for child in module.children():
        if isinstance(child, (nn.ModuleDict, nn.ModuleList)):
            yield from _units(child)
        else:
            yield child
