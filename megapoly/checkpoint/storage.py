"""A checkpoint's folder on disk: one safetensors file a rank, JSON metadata, nothing that can execute.

    step_00000100/
        metadata.json            every tensor: type, whole shape, and its chunks with their offsets and files
        shard_00000.safetensors  the chunks that rank 0 wrote, named `tensor@offset,offset`
        state.json               step, samples, configuration, fingerprint of the data plan

The folder is written under a temporary name and renamed when it is complete; `latest` beside it is written last.
"""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megapoly.errors import CheckpointError

FORMAT = "megapoly-checkpoint-1"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD = re.compile(r"shard_[0-9]{5,9}\.safetensors")


def chunk_key(name: str, offsets: tuple[int, ...]) -> str:
    """Name of a chunk inside its safetensors file."""
    return f"{name}@{','.join(map(str, offsets))}"


def write_text(path: Path, text: str) -> None:
    """Write a small file durably: a temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read a checkpoint's JSON file; CheckpointError names what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the folder is not a finished checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor and the file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**48 for item in value):
        raise ValueError(f"{value!r} is no list of sizes")
    return tuple(value)


def _record(entry: Any) -> TensorRecord:
    shape = _sizes(entry["shape"])
    chunks = []
    for offsets_entry, sizes_entry, file in entry["chunks"]:
        offsets, sizes = _sizes(offsets_entry), _sizes(sizes_entry)
        if not all(o + s <= whole for o, s, whole in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"chunk at {offsets} of {sizes} lies outside of {shape}")
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise ValueError(f"{file!r} is no shard's name")
        chunks.append(Chunk(offsets, sizes, file))
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(shape):
        raise ValueError(f"chunks hold {covered} entries, the shape {shape} has {math.prod(shape)}")
    begins = np.array([chunk.offsets for chunk in chunks]).reshape(len(chunks), -1)
    ends = begins + np.array([chunk.sizes for chunk in chunks]).reshape(len(chunks), -1)
    meets = ((begins[:, None] < ends[None]) & (begins[None] < ends[:, None])).all(-1)
    if meets.sum() > len(chunks):  # each meets itself; as many entries as the shape, so an overlap means a hole
        raise ValueError("chunks overlap")
    return TensorRecord(_DTYPES[entry["dtype"]], shape, tuple(chunks))


def read_records(folder: Path) -> dict[str, TensorRecord]:
    """All tensors that a checkpoint's metadata lists, checked for sense and against the sizes of its shards."""
    path = folder / "metadata.json"
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or not isinstance(tree.get("tensors"), dict):
        raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT}")
    records = {}
    claimed: Counter[str] = Counter()
    for name, entry in tree["tensors"].items():
        try:
            records[name] = record = _record(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor '{name}' is damaged: {error}") from None
        for chunk in record.chunks:
            claimed[chunk.file] += math.prod(chunk.sizes) * record.dtype.itemsize
    for file, size in claimed.items():
        shard = folder / file
        found = shard.stat().st_size if shard.is_file() else None
        if found is None or found < size:
            held = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{shard}: the shard {held}, metadata.json puts {size} bytes there; it is damaged")
    return records


class ShardFile:
    """One safetensors file of a checkpoint, opened once; tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safetensors.safe_open(str(path), framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: missing or damaged shard: {error}") from None

    def read(self, name: str, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """The tensor of a chunk."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(chunk_key(name, chunk.offsets))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{self.path}: chunk of '{name}' cannot be read: {error}") from None
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != dtype:
            raise CheckpointError(
                f"{self.path}: '{name}' is {tuple(tensor.shape)} {tensor.dtype}, metadata says {chunk.sizes} {dtype}"
            )
        return tensor


class Writer(StorageWriter):
    """Storage of torch.distributed.checkpoint: one safetensors file a rank, metadata as JSON."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The folder is given at construction."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks durably; a rank without any writes no file."""
        name = f"shard_{self.rank:05d}.safetensors"
        tensors, results = {}, []
        for item in plan.items:
            assert item.type is not WriteItemType.BYTE_IO
            data = planner.resolve_data(item)
            assert isinstance(data, torch.Tensor) and item.index.offset is not None
            tensors[chunk_key(item.index.fqn, tuple(item.index.offset))] = (
                data.detach().to("cpu", copy=True).contiguous()
            )
            results.append(WriteResult(index=item.index, size_in_bytes=data.nbytes, storage_data=name))
        if tensors:
            path = self.folder / name
            safetensors.torch.save_file(tensors, str(path))
            umask = os.umask(0)
            os.umask(umask)
            path.chmod(0o666 & ~umask)  # safetensors writes for the owner alone; a shared run is read by others
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write metadata.json (the coordinator alone)."""
        files = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for name, record in metadata.state_dict_metadata.items():
            assert isinstance(record, TensorStorageMetadata)
            chunks = [
                [list(c.offsets), list(c.sizes), files[MetadataIndex(name, torch.Size(c.offsets))]]
                for c in record.chunks
            ]
            dtype = str(record.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(record.size), "chunks": chunks}
        write_text(self.folder / "metadata.json", json.dumps({"format": FORMAT, "tensors": tensors}))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(StorageReader):
    """The counterpart of Writer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = read_records(folder)
        self._chunks = {
            (name, chunk.offsets): (record, chunk) for name, record in self.records.items() for chunk in record.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The folder is given at construction."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=record.dtype),
                    size=torch.Size(record.shape),
                    chunks=[ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in record.chunks],
                )
                for name, record in self.records.items()
            },
            storage_meta=StorageMeta(),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Everything was read at construction."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the asked-for rectangles into their places."""
        files: dict[str, ShardFile] = {}
        for item in plan.items:
            offset = item.storage_index.offset
            assert offset is not None
            record, chunk = self._chunks[item.storage_index.fqn, tuple(offset)]
            if chunk.file not in files:
                files[chunk.file] = ShardFile(self.folder / chunk.file)
            stored = files[chunk.file].read(item.storage_index.fqn, chunk, record.dtype)
            for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                stored = stored.narrow(dim, begin, length)
            target = planner.resolve_tensor(item)
            target.copy_(stored)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
