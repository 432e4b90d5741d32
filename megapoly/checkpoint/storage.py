"""A checkpoint's folder on disk: one safetensors file a rank, JSON, checksums of both, nothing that can execute.

    step_00000100/
        metadata.json            every tensor: type, whole shape, its chunks with their places in shards and CRC-32
        shard_00000.safetensors  the chunks that rank 0 wrote, named `tensor@offset,offset`
        state.json               step, samples, configuration, fingerprint of the data plan
        tokenizer.model, ..      the tokenizer's own files

metadata.json has a CRC-32 of itself, of every other small file and of every shard's header, so that no byte of a
checkpoint is without one.
"""

import json
import math
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapoly.checkpoint.folders import SHARD
from megapoly.errors import CheckpointError, DamageError
from megapoly.files import read_small

FORMAT = "megapoly-checkpoint-2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MOST_JSON = 128 << 20  # bytes of metadata.json or state.json: parsed, they may take twenty times as much memory
MOST_CHUNKS = 1 << 15  # of a tensor: a rank writes up to three of a matrix, and comparing all takes the square
MOST_DIMENSIONS = 8  # the product of many sizes has as many digits
_COMPARED = 256
_BLOCK = 1 << 20


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file that is on the disk when it has its name: a temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What it means that a file of a checkpoint cannot be read: damage, unless this user alone may not read it."""
    text = f"{path}: cannot be read: {error.strerror}"
    if isinstance(error, PermissionError):
        return CheckpointError(f"{text}; let this user read it, or start as the one who wrote it")
    return DamageError(text)


def _read_json_bytes(path: Path) -> bytes:
    try:
        return read_small(path, MOST_JSON)
    except FileNotFoundError:
        raise DamageError(f"{path}: missing; the folder is not a finished checkpoint") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _parsed(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path}: cannot be read as JSON: {error}") from None


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, the file that holds it, where its bytes begin there, and their CRC-32."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    crc: int


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def num_bytes(self, chunk: Chunk) -> int:
        """Length of a chunk's bytes."""
        return math.prod(chunk.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """Size of a file and a CRC-32: of all of it, of a shard of its first `begin` bytes only (the chunks follow)."""

    size: int
    crc: int
    begin: int


@dataclass(frozen=True)
class Contents:
    """What metadata.json says that a checkpoint holds."""

    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**48 for item in value):
        raise ValueError(f"{str(value)[:40]} is no list of sizes")
    return tuple(value)


def tensor_record(entry: Any) -> TensorRecord:
    """A tensor's entry in metadata.json, checked: its chunks lie within it, do not overlap and leave nothing out.

    Raises ValueError.
    """
    shape, dtype = _sizes(entry["shape"]), entry["dtype"]
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions are more than {MOST_DIMENSIONS}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"type {str(dtype)[:40]!r} is not {' or '.join(DTYPES)}")
    if len(entry["chunks"]) > MOST_CHUNKS:
        raise ValueError(f"{len(entry['chunks'])} chunks are more than {MOST_CHUNKS}")
    chunks = []
    for chunk in entry["chunks"]:
        if not isinstance(chunk, list) or len(chunk) != 5:
            raise ValueError(f"{str(chunk)[:40]} is no chunk: offsets, sizes, file, its first byte and CRC-32")
        offsets_entry, sizes_entry, file, begin, crc = chunk
        offsets, sizes, (begin, crc) = _sizes(offsets_entry), _sizes(sizes_entry), _sizes([begin, crc])
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"chunk at {offsets} of {sizes} has not the dimensions of {shape}")
        if not all(o + s <= whole for o, s, whole in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"chunk at {offsets} of {sizes} lies outside of {shape}")
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise ValueError(f"{file!r} is no shard's name")
        chunks.append(Chunk(offsets, sizes, file, begin, crc))
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(shape):
        raise ValueError(f"chunks hold {covered} entries, the shape {shape} has {math.prod(shape)}")
    if _some_meet(chunks):  # as many entries as the shape, so an overlap means a hole
        raise ValueError("chunks overlap")
    return TensorRecord(DTYPES[dtype], shape, tuple(chunks))


def _some_meet(chunks: list[Chunk]) -> bool:
    """Whether any two chunks have an entry in common; each is compared with all, some hundred at a time."""
    begins_ND = np.array([chunk.offsets for chunk in chunks]).reshape(len(chunks), -1)
    ends_ND = begins_ND + np.array([chunk.sizes for chunk in chunks]).reshape(len(chunks), -1)
    is_filled_N = (begins_ND < ends_ND).all(-1)  # an empty one meets nothing, nor itself
    met = 0
    for first in range(0, len(chunks), _COMPARED):
        begins, ends = begins_ND[first : first + _COMPARED, None], ends_ND[first : first + _COMPARED, None]
        met += int(((begins < ends_ND) & (begins_ND < ends)).all(-1).sum())
    return met > int(is_filled_N.sum())


def _seal(tree: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


def sealed(tree: dict[str, Any]) -> bytes:
    """The content of a metadata.json, with the checksum of what else is in it."""
    return json.dumps(tree | {"crc32": _seal(tree)}).encode()


def file_entry(path: Path) -> list[int]:
    """The entry of a small file in metadata.json: size, CRC-32, and how many bytes that is of."""
    content = path.read_bytes()
    return [len(content), zlib.crc32(content), len(content)]


def read_contents(folder: Path) -> Contents:
    """What a checkpoint's metadata lists, checked for sense and against its checksum and the sizes of the files."""
    path = folder / "metadata.json"
    tree = _parsed(path, _read_json_bytes(path))
    if not isinstance(tree, dict) or tree.pop("crc32", None) != _seal(tree):  # so that a damaged format is damage
        raise DamageError(f"{path}: its checksum does not fit; the file is damaged")
    if tree.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is of format {str(tree.get('format'))[:40]!r}, this version of megapoly reads {FORMAT!r}; "
            "read it with the version that wrote it"
        )
    tensors, where = {}, ""
    try:
        files = {name: FileRecord(*_sizes(entry)) for name, entry in tree["files"].items()}
        for name, entry in tree["tensors"].items():
            where = f"tensor '{name}': "
            tensors[name] = tensor_record(entry)
        where = ""
        _check_claims(tensors, files)
    except KeyError as error:
        raise CheckpointError(f"{path}: {where}entry {error} is missing") from None
    except (TypeError, AttributeError):
        raise CheckpointError(f"{path}: {where}an entry is not of the kind that it must be") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {where}cannot be: {error}") from None
    for name, record in files.items():
        try:
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
        except OSError as error:
            raise unreadable(folder / name, error) from None
        if found != record.size:
            held = "missing" if found is None else f"cut off or longer, with a size of {found:,} B"
            raise DamageError(f"{folder / name}: {held}; metadata.json says {record.size:,} B")
    return Contents(tensors, files)


def _check_claims(tensors: dict[str, TensorRecord], files: dict[str, FileRecord]) -> None:
    """Refuse names that are paths, and chunks that do not make up the shards after their headers; ValueError."""
    claimed: Counter[str] = Counter()
    for record in tensors.values():
        for chunk in record.chunks:
            claimed[chunk.file] += record.num_bytes(chunk)
            end = chunk.begin + record.num_bytes(chunk)
            if chunk.file not in files:
                raise ValueError(f"{chunk.file} holds chunks and is not among the files")
            if not files[chunk.file].begin <= chunk.begin <= end <= files[chunk.file].size:
                raise ValueError(f"bytes {chunk.begin} to {end} of {chunk.file} are no chunk's")
    for name, file in files.items():
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file's name")
        if file.begin + claimed[name] != file.size:
            raise ValueError(f"chunks hold {claimed[name]} bytes of {name}, it has {file.size - file.begin} for them")


def read_checked(folder: Path, name: str, contents: Contents) -> bytes:
    """The content of a small file of a checkpoint, against its checksum."""
    content, record = _read_json_bytes(folder / name), contents.files.get(name)
    if record is None:
        raise DamageError(f"{folder / name}: metadata.json does not list it; the checkpoint is damaged")
    if zlib.crc32(content) != record.crc:
        raise DamageError(f"{folder / name}: its checksum does not fit; the file is damaged")
    return content


def check_beginning(folder: Path, name: str, record: FileRecord) -> None:
    """Refuse a file whose first `begin` bytes (a shard's header, all of a small file) are not what was written."""
    path, found = folder / name, 0
    try:
        with path.open("rb") as file:
            for first in range(0, record.begin, _BLOCK):
                found = zlib.crc32(file.read(min(_BLOCK, record.begin - first)), found)
    except OSError as error:
        raise unreadable(path, error) from None
    if found != record.crc:
        what = "its checksum" if record.begin == record.size else "the checksum of its header"
        raise DamageError(f"{path}: {what} does not fit; the file is damaged")


def read_json(folder: Path, name: str, contents: Contents) -> Any:
    """A JSON file of a checkpoint, against its checksum."""
    return _parsed(folder / name, read_checked(folder, name, contents))
