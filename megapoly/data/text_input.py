"""Files of text as chunks of whole lines or rows: JSONL (plain, gzip, zstd) and Parquet, read as a stream.

A chunk says where reading goes on after it, so that a later process can begin there. Memory is bounded by the longest
line that is allowed, whatever a file holds or expands to.
"""

import glob
import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

import zstandard

from megapoly.data.templates import Template
from megapoly.data.zstandard_file import ZstdFile
from megapoly.errors import DataError

CHUNK_BYTES = 1 << 20
# The end of the last file comes in smaller chunks, so that all who work on chunks end at about the same time.
END_BYTES, END_CHUNK_BYTES = 4 << 20, 1 << 17
MAX_LINE_BYTES = 32 << 20
MAX_EXPANSION = 200.0
# Below this a file may expand as it likes: a few equal lines compress to almost nothing.
FREE_EXPANSION_BYTES = 64 << 20
PARQUET_ROWS = 32  # at once: a dictionary page may repeat its longest value in every row
EDGE_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


@dataclass(frozen=True)
class Limits:
    """The longest line (or value of Parquet) in bytes, and the most bytes of text for a byte of a compressed file.

    Raises DataError where nothing could be read within them.
    """

    line_bytes: int = MAX_LINE_BYTES
    expansion: float = MAX_EXPANSION

    def __post_init__(self) -> None:
        if self.line_bytes < 1:
            raise DataError(f"--max-line-mib ({self.line_bytes / 2**20:g}) must be above 0")
        if not self.expansion >= 1:
            raise DataError(f"--max-expansion ({self.expansion:g}) must be at least 1")


@dataclass(frozen=True)
class Position:
    """How far inputs are read: number of the file, bytes (rows) and lines of its text, bytes of all files on disk."""

    file: int = 0
    offset: int = 0
    lines: int = 0
    disk_bytes: int = 0


@dataclass
class Rows:
    """Rows of Parquet: for each key its values (None where null); identities and languages where a file has them."""

    values: dict[str, list[bytes | None]]
    ids: list[Any]
    languages: list[Any]


@dataclass
class Chunk:
    """Whole lines or rows of a file, the number of the first (from 1), and where the next chunk begins.

    `data` is None for a line that is over the limit: it is not held in memory.
    """

    path: str
    first: int
    data: bytes | Rows | None
    end: Position

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(number, line without its end) of a chunk of JSONL; blank lines are left out."""
        assert isinstance(self.data, bytes)
        data = self.data.removeprefix(BOM) if self.first == 1 else self.data
        for number, line in enumerate(data.split(b"\n"), self.first):
            if line and not line.isspace():
                yield number, line


@dataclass(frozen=True)
class Wanted:
    """What to read: `keys` with text, the key of the language, and whether bad lines are passed over.

    Each key gives a text of a document or, where there are templates of these keys, each template.
    """

    keys: tuple[str, ...] = ("text",)
    language_key: str = "lang"
    skip_bad_lines: bool = False
    limits: Limits = Limits()
    templates: tuple[Template, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of a document's texts."""
        return tuple(template.name for template in self.templates) or self.keys


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files in the order given; a pattern (`*`, `**`, `?`, `[..]`) that is no file stands for its sorted matches.

    Raises DataError for what does not exist, is no regular file, matches nothing or comes twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        if glob.has_magic(pattern) and not os.path.exists(pattern):
            found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
            if not found:
                raise DataError(f"{pattern}: matches no file; check --input")
            paths += found
        else:
            paths.append(pattern)
    seen: set[tuple[int, int]] = set()
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        except ValueError as error:  # a NUL in the name
            raise DataError(f"{path!r}: is no file name ({error}); check --input") from None
        if not stat.S_ISREG(status.st_mode):
            kind = "is a directory" if stat.S_ISDIR(status.st_mode) else "is no regular file"
            raise DataError(f"{path}: {kind}; give files, since an interrupted run reads them again")
        if (status.st_dev, status.st_ino) in seen:
            raise DataError(f"{path}: is given twice; give each file once and weights in the curriculum")
        seen.add((status.st_dev, status.st_ino))
    return paths


def describe_input(path: str) -> dict[str, Any]:
    """What tells whether a file is still the same: size, time of change and a digest of its first and last 64 KiB."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.blake2b(file.read(EDGE_BYTES), digest_size=16)
            file.seek(max(0, status.st_size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    except OSError as error:
        raise _unreadable(path, error) from None
    return {"path": path, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "edges": digest.hexdigest()}


def read_chunks(paths: Sequence[str], wanted: Wanted, start: Position = Position()) -> Iterator[Chunk]:
    """All files as chunks, from a position on.

    Raises DataError for a file that is missing, damaged, truncated, still being written or that expands too much.
    """
    before = sum(os.path.getsize(path) for path in paths[: start.file])
    for i in range(start.file, len(paths)):
        begin = start if i == start.file else Position(i, disk_bytes=before)
        yield from _file_chunks(paths[i], wanted, begin, before, is_last=i == len(paths) - 1)
        before += os.path.getsize(paths[i])


def read_lines(path: str, limits: Limits | None = None) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a text file, `.gz` or `.zst`; blank lines are left out.

    Raises DataError for a file that is missing, damaged or truncated, and for a line over the limit.
    """
    limits = limits or Limits()
    for chunk in _file_chunks(path, Wanted(limits=limits), Position(), 0):
        if chunk.data is None:
            raise DataError(f"{path}, line {chunk.first}: {too_long(limits.line_bytes)}")
        for number, line in chunk.lines():
            if len(line) > limits.line_bytes:
                raise DataError(f"{path}, line {number}: {too_long(limits.line_bytes)}")
            yield number, line


def too_long(limit: int) -> str:
    """What is said of a line over the limit."""
    size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
    return f"is over {size} long; split it or give a larger --max-line-mib"


def is_parquet(path: str) -> bool:
    """Whether a name is that of a Parquet file."""
    return path.endswith((".parquet", ".pq"))


def is_compressed(path: str) -> bool:
    """Whether a name is that of a compressed file of lines."""
    return path.endswith((".gz", ".zst"))


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror or error}; check --input")


def _changed(path: str) -> DataError:
    return DataError(f"{path}: changed while it was read; wait until it is written as a whole")


def _file_chunks(path: str, wanted: Wanted, start: Position, before: int, is_last: bool = False) -> Iterator[Chunk]:
    try:
        with open(path, "rb") as disk:
            at_first = os.fstat(disk.fileno())
            last = at_first.st_size - (END_BYTES if is_last else 0)
            given = (path, disk, wanted, start, before)
            try:
                yield from _parquet_chunks(*given) if is_parquet(path) else _jsonl_chunks(*given, last)
            except _DAMAGE as error:  # a sum that is wrong tells no more than that something before it is
                where = f"at or before byte {disk.tell():,} of {at_first.st_size:,}"
                raise DataError(f"{path}: damaged or truncated {where} ({error}); fetch it again") from None
            at_last = os.stat(path)
            if (at_first.st_size, at_first.st_mtime_ns) != (at_last.st_size, at_last.st_mtime_ns):
                raise _changed(path)
    except OSError as error:
        raise _unreadable(path, error) from None


# ------------------------------------------------------------------------------------------------- JSONL


class _Text:
    """The text of a file, decompressed; counts, and refuses what expands beyond the limit."""

    def __init__(self, path: str, disk: BinaryIO, limits: Limits, stack: ExitStack) -> None:
        self._path, self._disk, self._limits = path, disk, limits
        self.offset = 0
        self._size = os.fstat(disk.fileno()).st_size
        self._is_plain = not is_compressed(path)
        self._file: Any = disk
        if path.endswith(".gz"):
            self._file = stack.enter_context(gzip.GzipFile(fileobj=disk))
        elif path.endswith(".zst"):
            self._file = stack.enter_context(io.BufferedReader(ZstdFile(disk), 1 << 17))

    def read(self, size: int) -> bytes:
        piece: bytes = self._file.read(size)
        self.offset += len(piece)
        if self._disk.tell() > self._size:  # one that grows as fast as it is read would have no end
            raise _changed(self._path)
        expanded = not self._is_plain and self.offset > FREE_EXPANSION_BYTES
        if expanded and self.offset > self._limits.expansion * self._disk.tell():
            raise DataError(
                f"{self._path}: expands to over {self._limits.expansion:g} times its size; "
                "give a larger --max-expansion if that is meant"
            )
        return piece

    def skip(self, offset: int) -> None:
        """Go on at this byte of the text."""
        if self._is_plain:
            self._file.seek(offset)
            self.offset = offset
        while self.offset < offset and self.read(min(CHUNK_BYTES, offset - self.offset)):
            pass


def _jsonl_chunks(
    path: str, disk: BinaryIO, wanted: Wanted, start: Position, before: int, last: int
) -> Iterator[Chunk]:
    with ExitStack() as stack:
        text = _Text(path, disk, wanted.limits, stack)
        text.skip(start.offset)
        lines, held, held_bytes, unread = start.lines, [b""], 0, b""

        def chunk(data: bytes | None, count: int) -> Chunk:
            end = Position(start.file, text.offset - held_bytes - len(unread), lines + count, before + disk.tell())
            return Chunk(path, lines + 1, data, end)

        while True:
            size = CHUNK_BYTES if disk.tell() < last else min(CHUNK_BYTES, END_CHUNK_BYTES)
            piece, unread = unread or text.read(size), b""
            cut = piece.rfind(b"\n") + 1
            if cut or not piece:
                data = b"".join([*held, piece[:cut]])
                held, held_bytes = [piece[cut:]], len(piece) - cut
                if data:
                    found = chunk(data, data.count(b"\n") + (not data.endswith(b"\n")))
                    yield found
                    lines = found.end.lines
                if not piece:
                    return
            else:
                held.append(piece)
                held_bytes += len(piece)
            if held_bytes > wanted.limits.line_bytes:
                held, held_bytes = [b""], 0
                unread = _end_of_line(text) if wanted.skip_bad_lines else b""
                yield chunk(None, 1)
                if not wanted.skip_bad_lines:
                    return
                lines += 1


def _end_of_line(text: _Text) -> bytes:
    """Pass over the rest of a line; returns what was read of the text behind it."""
    while piece := text.read(CHUNK_BYTES):
        cut = piece.find(b"\n") + 1
        if cut:
            return piece[cut:]
    return b""


# ------------------------------------------------------------------------------------------------- Parquet


def _parquet_chunks(path: str, disk: BinaryIO, wanted: Wanted, start: Position, before: int) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs the package pyarrow; pip install 'megapoly[parquet]'") from None
    row = start.offset
    try:
        # buffer_size: pages are read one after the other and never a whole column of a row group.
        file = pyarrow.parquet.ParquetFile(disk, buffer_size=CHUNK_BYTES, pre_buffer=False)
        columns = _columns(path, file.schema_arrow, wanted)
        size, text_bytes = os.fstat(disk.fileno()).st_size, 0
        first_row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            begin, first_row = first_row, first_row + rows
            if row >= first_row:
                continue
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns, use_threads=False):
                skipped = max(0, row - begin)
                begin += batch.num_rows
                if skipped >= batch.num_rows:
                    continue
                data = _rows(path, batch.slice(skipped), wanted)
                first, row = row + 1, begin
                text_bytes += sum(len(value or b"") for values in data.values.values() for value in values)
                if text_bytes > max(FREE_EXPANSION_BYTES, wanted.limits.expansion * size):
                    raise DataError(
                        f"{path}: expands to over {wanted.limits.expansion:g} times its size; "
                        "give a larger --max-expansion if that is meant"
                    )
                share = size * row // max(1, file.metadata.num_rows)
                yield Chunk(path, first, data, Position(start.file, row, row, before + share))
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: damaged or no Parquet after row {row} ({reason}); fetch it again") from None


def _columns(path: str, schema: Any, wanted: Wanted) -> list[str]:
    import pyarrow

    columns = list(dict.fromkeys([*wanted.keys, *({"id", wanted.language_key} & set(schema.names))]))
    for name in columns:
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: has {schema.names.count(name)} columns '{name}'; write it with one")
    for key in wanted.keys:
        if key not in schema.names:
            raise DataError(f"{path}: column '{key}' is missing; the file has {sorted(schema.names)[:8]}")
        kind = schema.field(key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: column '{key}' holds {kind}, not strings; name another by --json-keys")
    return columns


def _rows(path: str, batch: Any, wanted: Wanted) -> Rows:
    import pyarrow

    def column(name: str) -> list[Any]:
        if name not in batch.schema.names:
            return []
        array = batch.column(name)
        try:
            return array.to_pylist()
        except ValueError as error:
            reason = " ".join(str(error).split())[:80]
            raise DataError(f"{path}: column '{name}' holds {array.type} ({reason}); write it as strings") from None

    # As bytes: that they are UTF-8 is for the one to find who says which row is bad.
    values: dict[str, list[bytes | None]] = {}
    for key in wanted.keys:
        array = batch.column(key)
        array = array.dictionary_decode() if pyarrow.types.is_dictionary(array.type) else array
        values[key] = array.cast(pyarrow.large_binary()).to_pylist()
    ids = values["id"] if "id" in values else column("id")
    return Rows(values, ids, column(wanted.language_key))
