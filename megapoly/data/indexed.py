"""Token files in Megatron-LM's `.bin`/`.idx` format: reading, writing, and many of them as one stream.

`.bin` holds the tokens of all sequences back to back, without a header. `.idx` (all little endian) holds
`MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, the number of sequences u64, the length of the document index u64,
then the sequences' lengths (int32), their byte offsets (int64) and the document index (int64, from 0 to n sequences).
"""

import array
import itertools
import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megapoly.data.reader import DTYPES, HEADER, INDEX_CHUNK, MAGIC, VERSION, IndexedDataset, check_ids
from megapoly.errors import DataError

CODES = {dtype: code for code, dtype in DTYPES.items()}
FULL_SCAN_BYTES = 64 << 20
EDGE_SCAN_BYTES = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """The type in which Megatron-LM stores ids below vocab_size: uint16 if vocab_size < 65500, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class IndexedDatasetWriter:
    """Writes PREFIX.bin / PREFIX.idx, one sequence a document; nothing carries those names before `finalize`.

    Used as a context manager it removes its temporary files unless `finalize` was reached.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix, self.vocab_size, self.dtype = prefix, vocab_size, token_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array.array("i")
        self._temporary = {kind: f"{prefix}.{kind}.tmp-{os.getpid()}" for kind in ("bin", "idx")}
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._temporary["bin"], "wb")  # noqa: SIM115  closed by finalize or discard
        except OSError as error:
            raise DataError(f"{prefix}: cannot be written: {error.strerror or error}") from None

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

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
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.frombytes(lengths[lengths > 0].astype(np.intc).tobytes())
        self.num_tokens += len(tokens)

    def finalize(self) -> None:
        """Flush to the disk and give both files their names, the index last."""
        _sync_and_close(self._bin)
        n = len(self._lengths)
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        index = open(self._temporary["idx"], "wb")  # noqa: SIM115
        with index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], n, n + 1))
            index.write(lengths.astype("<i4").tobytes())
            offset = 0
            for begin in range(0, n, INDEX_CHUNK):
                sizes = lengths[begin : begin + INDEX_CHUNK].astype("<i8") * self.dtype.itemsize
                ends = offset + np.cumsum(sizes)
                index.write((ends - sizes).astype("<i8").tobytes())
                offset = int(ends[-1])
            for begin in range(0, n + 1, INDEX_CHUNK):
                index.write(np.arange(begin, min(begin + INDEX_CHUNK, n + 1), dtype="<i8").tobytes())
            _sync_and_close(index)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)  # an older index must not meet the new tokens
        os.replace(self._temporary["bin"], f"{self.prefix}.bin")
        os.replace(self._temporary["idx"], f"{self.prefix}.idx")
        _sync_directory(Path(self.prefix).parent)

    def discard(self) -> None:
        """Remove what was written; after `finalize` this does nothing."""
        self._bin.close()
        for path in self._temporary.values():
            Path(path).unlink(missing_ok=True)

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class TokenStream:
    """Several datasets one after the other as one stream of tokens.

    With `vocab_size`, every read is checked against it. Raises DataError for damaged files and ids out of range.
    """

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


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
