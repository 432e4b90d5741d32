"""One rank's shard: a safetensors file, written from memory block by block and read chunk by chunk, with checksums.

A block is small enough to be in a core's cache still when its checksum is taken. Neither that nor reading and writing
needs the interpreter's lock, so that training goes on beside it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:  # the same numbers, several times slower
    from zlib import crc32

from megapoly.checkpoint.state import Piece
from megapoly.checkpoint.storage import Chunk, TensorRecord, unreadable
from megapoly.errors import CheckpointError, DamageError

BLOCK = 1 << 20
AHEAD = 64 << 20  # bytes that the disk fetches while what lies before them is checked and copied
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def chunk_key(name: str, offsets: tuple[int, ...]) -> str:
    """Name of a chunk inside its safetensors file."""
    return f"{name}@{','.join(map(str, offsets))}"


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").reshape(-1).view(torch.uint8).numpy().data


def _header(pieces: Iterable[Piece]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for p in pieces:
        begin, end = end, end + p.tensor.nbytes
        place = {"dtype": _CODES[p.tensor.dtype], "shape": list(p.tensor.shape), "data_offsets": [begin, end]}
        entries[chunk_key(p.name, p.offsets)] = place
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, pieces: list[Piece]) -> dict[str, Any]:
    """Write pieces durably as a new safetensors file; returns its part of metadata.json. Raises OSError.

    Pieces on a GPU are fetched one by one.
    """
    header = _header(pieces)
    chunks, begin = [], len(header)
    with path.open("xb", buffering=0) as file:
        _write(file, memoryview(header))
        for p in pieces:
            content, crc = _bytes_of(p.tensor), 0
            for first in range(0, len(content), BLOCK):
                block = content[first : first + BLOCK]
                _write(file, block)
                crc = crc32(block, crc)
            dtype = str(p.tensor.dtype).removeprefix("torch.")
            chunks.append([p.name, dtype, p.shape, [p.offsets, tuple(p.tensor.shape), path.name, begin, crc]])
            begin += len(content)
        os.fsync(file.fileno())
    return {"files": {path.name: [begin, crc32(header), len(header)]}, "chunks": chunks}


def _write(file: Any, content: memoryview) -> None:
    while content:  # one call may write a part
        content = content[file.write(content) :]


class ShardReader:
    """Reads chunks of a checkpoint's shards, where they cannot go to their place into one memory as large as needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._memory = np.empty(0, dtype=np.uint8)
        self._file: BinaryIO | None = None
        self._name = ""

    def read(self, name: str, record: TensorRecord, chunk: Chunk, into: Tensor | None = None) -> Tensor:
        """A chunk of tensor `name`, whole and checked. Raises DamageError, CheckpointError where memory lacks for it.

        It is in `into` (of its shape) where that can take its bytes as they are, else it holds until the next call.
        """
        path, target = self.folder / chunk.file, into
        if target is None or target.device.type != "cpu" or not target.is_contiguous() or target.dtype != record.dtype:
            size = record.num_bytes(chunk)
            try:
                target = self._room(size).view(record.dtype).view(chunk.sizes)
            except MemoryError:  # a file of holes has any size
                raise CheckpointError(
                    f"{path}: '{name}' at {chunk.offsets} has {size:,} bytes, more than this host's memory has room for"
                ) from None
        try:
            found = self._fill(path, chunk.begin, _bytes_of(target))
        except OSError as error:
            raise unreadable(path, error) from None
        if found != chunk.crc:
            raise DamageError(f"{path}: the checksum of '{name}' at {chunk.offsets} does not fit; the shard is damaged")
        return target

    def _room(self, size: int) -> Tensor:
        if len(self._memory) < size:
            self._memory = np.empty(0, dtype=np.uint8)  # the old memory goes before the new one comes
            self._memory = np.empty(size, dtype=np.uint8)
        return torch.from_numpy(self._memory[:size])

    def _fill(self, path: Path, begin: int, content: memoryview) -> int:
        """Read a file's bytes from `begin` on; returns their checksum."""
        if self._file is None or self._name != path.name:
            self.close()
            self._file, self._name = path.open("rb", buffering=0), path.name
        self._file.seek(begin)
        os.posix_fadvise(self._file.fileno(), begin, len(content) + AHEAD, os.POSIX_FADV_WILLNEED)
        crc = 0
        for first in range(0, len(content), BLOCK):
            block = content[first : first + BLOCK]
            self._read_into(block)
            crc = crc32(block, crc)
        return crc

    def _read_into(self, content: memoryview) -> None:
        while content:
            count = self._file.readinto(content)  # type: ignore[union-attr]
            if not count:
                raise OSError(0, "it ends too early")
            content = content[count:]

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.close()
        self._file = None


@contextmanager
def reading(folder: Path) -> Iterator[ShardReader]:
    """A reader of a checkpoint's shards, closed at the end."""
    reader = ShardReader(folder)
    try:
        yield reader
    finally:
        reader.close()
