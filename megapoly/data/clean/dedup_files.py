"""Files of fixed-size records in sections, each with a checksum, and the merging of sorted sections of many files.

sections of records | facts as JSON | length and CRC-32 of the facts, magic. A file appears whole or not at all.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megapoly.data.indexed import sync_directory
from megapoly.errors import DataError

Records = npt.NDArray[Any]

TAIL = struct.Struct("<QI4s")
MAGIC = b"MPDD"
HASHED = np.dtype([("hash", "<u8"), ("document", "<u4")])
BLOCK = 1 << 18  # records read at once where one file is read alone
LEAST_SHARE = 1024  # records of each file where many are read together


class RecordWriter:
    """Writes a file section by section; leaving the context by an error leaves no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._sections: list[list[int]] = []  # bytes, CRC-32
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by the context

    def begin(self) -> None:
        """Begin the next section; its number is its place."""
        self._sections.append([0, 0])

    def add(self, records: Records) -> None:
        """Append records to the section begun last."""
        content = np.ascontiguousarray(records).tobytes()
        section = self._sections[-1]
        self._file.write(content)
        section[:] = section[0] + len(content), zlib.crc32(content, section[1])

    def section(self, records: Records) -> None:
        """Write a whole section."""
        self.begin()
        self.add(records)

    def finish(self, facts: dict[str, Any]) -> None:
        """Write what the file says of itself, bring all to the disk and give the file its name."""
        text = json.dumps({"facts": facts, "sections": self._sections}).encode()
        self._file.write(text + TAIL.pack(len(text), zlib.crc32(text), MAGIC))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class RecordFile:
    """A file of sections: its facts, and where each section lies."""

    path: Path
    facts: dict[str, Any]
    sections: npt.NDArray[np.int64]  # [sections, 2]: bytes, CRC-32

    @classmethod
    def open(cls, path: Path, expected: dict[str, Any], stage: str) -> "RecordFile":
        """Read what a file says of itself.

        Raises DataError where it is missing (then `stage` has to run first), damaged, or of other settings than
        `expected`.
        """
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                file.seek(max(size - TAIL.size, 0))
                tail = file.read(TAIL.size)
                length, crc32, magic = TAIL.unpack(tail) if len(tail) == TAIL.size else (0, 0, b"")
                if magic != MAGIC or length > size - TAIL.size:
                    raise damaged(path)
                file.seek(size - TAIL.size - length)
                text = file.read(length)
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing: the stage '{stage}' of deduplication has to end first") from error
        if zlib.crc32(text) != crc32:
            raise damaged(path)
        content = json.loads(text)
        sections = np.array(content["sections"], dtype=np.int64).reshape(-1, 2)
        if sections[:, 0].sum() != size - TAIL.size - length:
            raise damaged(path)
        for name, value in expected.items():
            found = content["facts"].get(name)
            if found != value:
                raise DataError(
                    f"{path} was made with {name} {found}, this run has {value}: "
                    f"give the same again or remove {path.parents[1]}"
                )
        return cls(path, content["facts"], sections)

    def stream(self, section: int, dtype: npt.DTypeLike) -> "SectionStream":
        """The records of a section from the first on."""
        return SectionStream(self, section, np.dtype(dtype))

    def read(self, section: int, dtype: npt.DTypeLike) -> Records:
        """All records of a section."""
        stream = self.stream(section, dtype)
        return stream.read(stream.left)


class SectionStream:
    """Reads a section block by block and checks it at its end; holds no file open, for there may be thousands."""

    def __init__(self, file: RecordFile, section: int, dtype: np.dtype[Any]) -> None:
        size, self._expected = (int(number) for number in file.sections[section])
        self.path = file.path
        self.left = size // dtype.itemsize  # records not read yet
        self._dtype = dtype
        self._at = int(file.sections[:section, 0].sum())
        self._crc32 = 0

    def read(self, records: int) -> Records:
        """The next records, fewer at the end; raises DataError where the section turns out damaged."""
        count = min(records, self.left)
        with open(self.path, "rb") as file:
            file.seek(self._at)
            content = file.read(count * self._dtype.itemsize)
        self._at += len(content)
        self._crc32 = zlib.crc32(content, self._crc32)
        self.left -= count
        if len(content) != count * self._dtype.itemsize or (not self.left and self._crc32 != self._expected):
            raise damaged(self.path)
        return np.frombuffer(content, self._dtype)

    def blocks(self) -> Iterator[Records]:
        """All records that are left, in blocks."""
        while self.left:
            yield self.read(BLOCK)


def merged(streams: list[SectionStream], memory: int) -> Iterator[tuple[Records, npt.NDArray[np.int64]]]:
    """The records (HASHED) of sorted sections in one order by hash: blocks of them, and the stream each comes from.

    At any time about `memory` records are held, whatever their number on the disk; each section is read once.
    """
    share = max(memory // max(len(streams), 1), LEAST_SHARE)
    held = [np.empty(0, HASHED) for _ in streams]
    while True:
        for i, stream in enumerate(streams):
            if stream.left and len(held[i]) <= share // 2:
                held[i] = np.concatenate([held[i], stream.read(share - len(held[i]))])
        # Beyond the lowest of these hashes another file may still have smaller ones to come.
        last = [block["hash"][-1] for block, stream in zip(held, streams, strict=True) if stream.left]
        bound = min(last) if last else np.uint64(2**64 - 1)
        ready = [np.searchsorted(block["hash"], bound, side="right") for block in held]
        if not any(ready):
            return
        records = np.concatenate([block[:n] for block, n in zip(held, ready, strict=True)])
        sources = np.repeat(np.arange(len(streams)), ready)
        held = [block[n:] for block, n in zip(held, ready, strict=True)]
        order = np.argsort(records["hash"], kind="stable")
        yield records[order], sources[order]


def damaged(path: Path) -> DataError:
    """The error for a file that is not what was written."""
    return DataError(f"{path} is damaged or cut short: remove {path.parents[1]} and run deduplication again")
