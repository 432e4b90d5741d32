"""The state of training as rectangles of whole tensors, which no layout can be told from.

A rank owns at most one flat range of each parameter that it holds (ZeRO-1). In the whole parameter such a range is a
handful of rectangles; each becomes a chunk of the checkpoint, so that any other layout can read what it needs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megapoly.errors import CheckpointError
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


class PieceSavePlanner(SavePlanner):
    """Plans a save of pieces; each is written by the rank that has it."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = {MetadataIndex(p.name, torch.Size(p.offsets)): p for p in pieces}

    def set_up_planner(
        self, state_dict: object, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """The pieces are given at construction."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(p.offsets), p.tensor.shape),
                        properties=TensorProperties(dtype=p.tensor.dtype),
                        size=torch.Size(p.shape),
                    ),
                )
                for index, p in self.pieces.items()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors: dict[str, TensorStorageMetadata] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            assert data is not None
            record = tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            assert record.size == data.size
            record.chunks.append(data.chunk)
        for name, record in tensors.items():
            saved = sum(chunk.sizes.numel() for chunk in record.chunks)
            assert saved == record.size.numel(), f"{name}: {saved} of {record.size.numel()} entries would be saved"
        return all_plans, Metadata(state_dict_metadata=dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index].tensor


class PieceLoadPlanner(LoadPlanner):
    """Plans a load into pieces from whatever chunks the checkpoint has."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = {(p.name, p.offsets): p for p in pieces}
        self.metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: object, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for p in self.pieces.values():
            record = self.metadata.state_dict_metadata.get(p.name)
            if not isinstance(record, TensorStorageMetadata) or tuple(record.size) != p.shape:
                found = "nothing" if record is None else str(tuple(getattr(record, "size", ())))
                raise CheckpointError(f"the checkpoint has {found} for '{p.name}', the model wants {p.shape}")
            chunk = ChunkStorageMetadata(torch.Size(p.offsets), p.tensor.shape)
            items += create_read_items_for_chunk_list(p.name, record, [chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        raise CheckpointError(f"'{read_item.storage_index.fqn}' is no tensor; checkpoints hold nothing else")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        offset = read_item.dest_index.offset
        assert offset is not None
        target = self.pieces[read_item.dest_index.fqn, tuple(offset)].tensor
        for dim, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, begin, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """resolve_tensor returned a view of the piece itself: nothing is left to do."""
