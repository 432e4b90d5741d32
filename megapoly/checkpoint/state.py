"""The state of training as rectangles of whole tensors, which no layout can be told from.

A rank owns at most one flat range of each parameter that it holds (ZeRO-1). In the whole parameter such a range is a
handful of rectangles; each becomes a chunk of the checkpoint, so that any other layout can read what it needs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megapoly.optim.sharded import ShardedOptimizer
from megapoly.optim.spans import Portion
from megapoly.parallel.gradients import FlatBuffers


@dataclass(frozen=True)
class Piece:
    """A rectangle of a whole tensor and this rank's memory for it."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the rectangles that make up entries begin to end of a row-major tensor, in order.

    At most 2 d - 1 of them for d dimensions.
    """
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    row = torch.Size(shape[1:]).numel()
    first, last = begin // row, (end - 1) // row
    if first == last:
        for offsets, sizes in rectangles(shape[1:], begin - first * row, end - first * row):
            yield (first, *offsets), (1, *sizes)
        return
    whole_first = first if begin == first * row else first + 1
    whole_last = last + 1 if end == (last + 1) * row else last
    if whole_first > first:
        for offsets, sizes in rectangles(shape[1:], begin - first * row, row):
            yield (first, *offsets), (1, *sizes)
    if whole_last > whole_first:
        yield (whole_first, *(0 for _ in shape[1:])), (whole_last - whole_first, *shape[1:])
    if whole_last == last:
        for offsets, sizes in rectangles(shape[1:], 0, end - last * row):
            yield (last, *offsets), (1, *sizes)


def pieces(buffers: FlatBuffers, owned: Mapping[str, Tensor | Portion], for_saving: bool) -> list[Piece]:
    """This rank's shard of flat quantities (prefix -> tensor) as pieces; padding rows are left out.

    For saving, what several ranks hold alike comes from one of them; for loading every rank takes all that it holds.
    """
    result = []
    for segment in buffers.segments:
        if for_saving and not segment.is_counted:
            continue
        shard = segment.shard
        first, last = segment.owned
        held = {
            prefix: flat.of(segment) if isinstance(flat, Portion) else flat[first:last]
            for prefix, flat in owned.items()
        }
        position = 0
        last = min(last, segment.offset + torch.Size(shard.sizes).numel())
        for offsets, sizes in rectangles(shard.sizes, first - segment.offset, last - segment.offset):
            count = torch.Size(sizes).numel()
            whole = tuple(o + s for o, s in zip(offsets, shard.offsets, strict=True))
            for prefix, flat in held.items():
                if len(flat):
                    memory = flat[position : position + count].view(sizes)
                    result.append(Piece(f"{prefix}.{segment.name}", shard.shape, whole, memory))
            position += count
    return result


def training_state(optimizer: ShardedOptimizer) -> dict[str, Tensor | Portion]:
    """The flat quantities that a checkpoint holds: master weights as `model`, AdamW's moments, Muon's momentum."""
    moments = {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq, "momentum": optimizer.momentum}
    return {"model": optimizer.master, **moments}
