"""Token files in Megatron-LM's `.bin`/`.idx` format: reading, writing, and many of them as one stream.

`.bin` holds the tokens of all sequences back to back, without a header. `.idx` (all little endian) holds
`MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, the number of sequences u64, the length of the document index u64,
then the sequences' lengths (int32), their byte offsets (int64) and the document index (int64, from 0 to n sequences).
"""

import io
import itertools
import os
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megapoly.data.reader import DTYPES, HEADER, MAGIC, VERSION, IndexedDataset, check_ids
from megapoly.errors import DataError

CODES = {dtype: code for code, dtype in DTYPES.items()}
WRITE_CHUNK = 1 << 18  # entries of the index that are written at once
FULL_SCAN_BYTES = 64 << 20
EDGE_SCAN_BYTES = 1 << 16
PACK_NOTE = ".pack.json"  # beside a packed pair; packed.py says what it holds


def token_dtype(vocab_size: int) -> np.dtype:
    """The type in which Megatron-LM stores ids below vocab_size: uint16 if vocab_size < 65500, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class IndexedDatasetWriter:
    """Writes PREFIX.bin / PREFIX.idx, one sequence a document; nothing carries those names before `finalize`.

    Used as a context manager it removes its temporary files unless `finalize` was reached. Memory does not grow with
    the documents. With `spool` the temporary files are SPOOL.bin, SPOOL.lengths and SPOOL.idx and stay where they are
    on an error; `resume_at` (documents, tokens), as `sync` returned it, goes on behind those that are there already.
    """

    def __init__(
        self, prefix: str, vocab_size: int, spool: str | None = None, resume_at: tuple[int, int] = (0, 0)
    ) -> None:
        self.prefix, self.vocab_size, self.dtype = prefix, vocab_size, token_dtype(vocab_size)
        self.num_documents, self.num_tokens = resume_at
        self._is_kept = spool is not None
        kinds = ("bin", "lengths", "idx")
        mark = f".tmp-{os.getpid()}"
        self.temporary = {kind: f"{spool}.{kind}" if spool else f"{prefix}.{kind}{mark}" for kind in kinds}
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = _open_at(self.temporary["bin"], self.num_tokens * self.dtype.itemsize)
            self._lengths = _open_at(self.temporary["lengths"], 4 * self.num_documents)
        except OSError as error:
            raise DataError(f"{prefix}: cannot be written: {error.strerror or error}") from None

    def add_document(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Append one document; an empty one is not written. Raises DataError for an id outside of the vocabulary."""
        ids = np.asarray(tokens, dtype=np.int64)
        self.add_documents(ids, np.array([len(ids)], dtype=np.int64))

    def add_documents(self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> None:
        """Append many documents at once: their tokens back to back, and the length of each."""
        assert tokens.ndim == 1 and int(lengths.sum()) == len(tokens)
        if not len(tokens):
            return
        check_ids(tokens, self.vocab_size, self.prefix, self.num_tokens)
        filled = lengths[lengths > 0]
        _write(self._bin, np.ascontiguousarray(tokens, dtype=self.dtype).data)
        _write(self._lengths, filled.astype("<i4").data)
        self.num_documents += len(filled)
        self.num_tokens += len(tokens)

    def sync(self) -> tuple[int, int]:
        """Bring all that was added to the disk; returns (documents, tokens)."""
        for file in (self._bin, self._lengths):
            os.fsync(file.fileno())
        return self.num_documents, self.num_tokens

    def finalize(self) -> None:
        """Bring everything to the disk and give both files their names, the index last."""
        self.prepare()
        self.publish()

    def prepare(self) -> None:
        """Write the index and bring all to the disk, under temporary names."""
        self.sync()
        self.close()
        n = self.num_documents
        index = open(self.temporary["idx"], "wb", buffering=0)  # noqa: SIM115  closed with its contents on the disk
        with index, open(self.temporary["lengths"], "rb") as file:
            _write(index, HEADER.pack(MAGIC, VERSION, CODES[self.dtype], n, n + 1))
            while piece := file.read(4 * WRITE_CHUNK):
                _write(index, piece)
            file.seek(0)
            offset = 0
            while piece := file.read(4 * WRITE_CHUNK):
                ends = offset + np.cumsum(np.frombuffer(piece, "<i4"), dtype="<i8") * self.dtype.itemsize
                starts = np.concatenate([np.array([offset], "<i8"), ends[:-1]])
                _write(index, starts.data)
                offset = int(ends[-1])
            for begin in range(0, n + 1, WRITE_CHUNK):
                _write(index, np.arange(begin, min(begin + WRITE_CHUNK, n + 1), dtype="<i8").data)
            os.fsync(index.fileno())

    def publish(self) -> None:
        """Rename what `prepare` wrote; called again after a kill it goes on where that one ended."""
        publish(self.prefix, self.temporary)

    def close(self) -> None:
        """Close the files and leave them."""
        self._bin.close()
        self._lengths.close()

    def discard(self) -> None:
        """Remove what was written; after `finalize` this does nothing."""
        self.close()
        for path in self.temporary.values():
            Path(path).unlink(missing_ok=True)

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_kept:
            self.close()
        else:
            self.discard()


def publish(prefix: str, temporary: Mapping[str, str]) -> None:
    """Give the files of a prepared dataset their names, the index last: with it a packed one has its note already.

    Done again it changes nothing.
    """
    if os.path.exists(temporary["bin"]):
        for older in (".idx", PACK_NOTE):  # which must not meet the new tokens
            Path(prefix + older).unlink(missing_ok=True)
        os.replace(temporary["bin"], f"{prefix}.bin")
    if "note" in temporary and os.path.exists(temporary["note"]):
        os.replace(temporary["note"], prefix + PACK_NOTE)
    if os.path.exists(temporary["idx"]):
        sync_directory(Path(prefix).parent)  # the names of tokens and note reach the disk before the index's
        os.replace(temporary["idx"], f"{prefix}.idx")
    Path(temporary["lengths"]).unlink(missing_ok=True)
    sync_directory(Path(prefix).parent)


class TokenStream:
    """Several datasets one after the other as one stream of tokens.

    With `vocab_size`, every read is checked against it. Raises DataError for damaged files and ids out of range.
    """

    num_rows = 0  # of packed documents: packed.py

    def __init__(self, prefixes: Sequence[str], vocab_size: int | None = None) -> None:
        self.datasets = [IndexedDataset(prefix) for prefix in prefixes]
        self.vocab_size = vocab_size
        self._ends = list(itertools.accumulate(dataset.num_tokens for dataset in self.datasets))

    @property
    def num_tokens(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens begin to end (exclusive) of the whole stream, across the borders of files."""
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"tokens [{begin}, {end}) lie outside of [0, {self.num_tokens})")
        first = bisect_right(self._ends, begin)
        if first < len(self._ends) and end <= self._ends[first]:  # mostly: one file holds them
            return self._read_of(first, begin, end)
        parts = [np.empty(0, dtype=np.int64)]
        for i in range(first, bisect_left(self._ends, end) + 1 if begin < end else first):
            before = self._ends[i] - self.datasets[i].num_tokens
            parts.append(self._read_of(i, max(begin, before), min(end, self._ends[i])))
        return np.concatenate(parts)

    def _read_of(self, i: int, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens begin to end of the stream, which dataset i holds."""
        before = self._ends[i] - self.datasets[i].num_tokens
        return self.datasets[i].read(begin - before, end - before, self.vocab_size)

    def check_vocab(self, vocab_size: int) -> None:
        """Raise DataError for an id that the vocabulary lacks.

        Of a stream over 64 MiB only the first and last 64 KiB of each file are read, since every rank does it at every
        start; `read` checks the rest as it comes.
        """
        is_small = sum(dataset.num_tokens * dataset.dtype.itemsize for dataset in self.datasets) <= FULL_SCAN_BYTES
        for dataset in self.datasets:
            n, edge = dataset.num_tokens, EDGE_SCAN_BYTES // dataset.dtype.itemsize
            for begin in range(0, n, edge) if is_small else (0, max(n - edge, 0)):
                check_ids(dataset.tokens(begin, min(n, begin + edge)), vocab_size, dataset.bin_path, begin)


def _open_at(path: str, size: int) -> io.FileIO:
    """A file to write behind its first `size` bytes, unbuffered: no byte is left to fail when it is closed."""
    if not size:
        return open(path, "wb", buffering=0)
    file = open(path, "r+b", buffering=0)  # noqa: SIM115  for the writer to close
    found = os.fstat(file.fileno()).st_size
    if found < size:
        file.close()
        raise DataError(f"{path}: has {found} bytes where {size} were written; begin anew with --restart")
    file.truncate(size)
    file.seek(size)
    return file


def _write(file: io.FileIO, content: bytes | memoryview) -> None:
    left = memoryview(content).cast("B")
    while left:
        left = left[file.write(left) :]


def sync_directory(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
