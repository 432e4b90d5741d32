"""Token files in Megatron-LM's `.bin`/`.idx` format: reading, writing, and many of them as one stream.

`.bin` holds the tokens of all sequences back to back, without a header. `.idx` (all little endian) holds
`MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, the number of sequences u64, the length of the document index u64,
then the sequences' lengths (int32), their byte offsets (int64) and the document index (int64, from 0 to n sequences).
"""

import io
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megapoly.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOAT_CODES = (6, 7)
# Entries of the index that are checked or written at once: bounds the temporaries at billions of documents.
INDEX_CHUNK = 1 << 22
WRITE_CHUNK = 1 << 18  # entries of the index that are written at once
FULL_SCAN_BYTES = 64 << 20
EDGE_SCAN_BYTES = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """The type in which Megatron-LM stores ids below vocab_size: uint16 if vocab_size < 65500, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class IndexedDataset:
    """A memory-mapped pair PREFIX.bin / PREFIX.idx, checked as a whole before a single token is served.

    Raises DataError where a file is missing or where header, index and .bin contradict each other.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.idx_path, self.bin_path = f"{prefix}.idx", f"{prefix}.bin"
        for path in (self.idx_path, self.bin_path):
            if not Path(path).is_file():
                raise DataError(f"{path}: no such file; give the prefix of a .bin/.idx pair or run preprocess_data.py")
        try:
            self._open()
        except OSError as error:
            raise DataError(f"{error.filename or self.idx_path}: cannot be read: {error.strerror or error}") from None

    def _open(self) -> None:
        n_sequences, n_entries = self._read_header()
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r", offset=0)
        ends = np.cumsum([HEADER.size, 4 * n_sequences, 8 * n_sequences, 8 * n_entries])
        self.lengths: npt.NDArray[np.int32] = index[ends[0] : ends[1]].view("<i4")
        self.offsets: npt.NDArray[np.int64] = index[ends[1] : ends[2]].view("<i8")
        self.document_index: npt.NDArray[np.int64] = index[ends[2] : ends[3]].view("<i8")
        self._check_sequences()
        self._check_documents()
        if self.num_tokens:
            # As a plain array, whose slices cost a tenth of a memmap's.
            self._tokens: npt.NDArray[np.integer] = np.asarray(np.memmap(self.bin_path, dtype=self.dtype, mode="r"))
        else:
            self._tokens = np.empty(0, dtype=self.dtype)  # an empty file cannot be mapped

    def _read_header(self) -> tuple[int, int]:
        with open(self.idx_path, "rb") as file:
            header = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
        if len(header) < HEADER.size:
            raise self._damage(f"is {size} bytes long, shorter than its header of {HEADER.size}")
        magic, version, code, n_sequences, n_entries = HEADER.unpack(header)
        if magic != MAGIC:
            raise self._damage(f"starts with {magic!r}, not with {MAGIC!r}: this is no Megatron-LM index")
        if version != VERSION:
            raise self._damage(f"has version {version}; only version {VERSION} is known")
        if code not in DTYPES:
            kind = "holds floating-point numbers, not tokens" if code in FLOAT_CODES else "is unknown"
            raise self._damage(f"has dtype code {code}, which {kind} (known: {sorted(DTYPES)})")
        expected = HEADER.size + 12 * n_sequences + 8 * n_entries
        if size != expected:
            raise self._damage(
                f"is {size} bytes long, but {n_sequences} sequences and {n_entries} document entries need {expected}"
            )
        self.dtype = DTYPES[code]
        return n_sequences, n_entries

    def _check_sequences(self) -> None:
        item, expected = self.dtype.itemsize, 0
        size = os.path.getsize(self.bin_path)
        for begin in range(0, self.num_sequences, INDEX_CHUNK):
            lengths = self.lengths[begin : begin + INDEX_CHUNK].astype(np.int64)
            offsets = self.offsets[begin : begin + INDEX_CHUNK]
            if lengths.min() < 0:
                i = int(np.argmax(lengths < 0))
                raise self._damage(f"gives sequence {begin + i} the length {lengths[i]}; lengths must be at least 0")
            ends = expected + np.cumsum(lengths) * item
            starts = ends - lengths * item
            wrong = offsets != starts
            if wrong.any():
                i = int(np.argmax(wrong))
                raise self._damage(f"puts sequence {begin + i} at byte {offsets[i]}, not at {starts[i]}")
            expected = int(ends[-1])
            if expected > size:
                break
        if size != expected:
            raise DataError(
                f"{self.bin_path}: is {size} bytes long, but {self.idx_path} describes {expected}; "
                "write or copy the pair again"
            )
        self.num_tokens = size // item

    def _check_documents(self) -> None:
        n = len(self.document_index)
        if n == 0:
            raise self._damage("has 0 document entries; at least 1 is needed")
        first, last = int(self.document_index[0]), int(self.document_index[-1])
        if first != 0 or last != self.num_sequences:
            raise self._damage(
                f"has a document index from {first} to {last}; it must run from 0 to {self.num_sequences}"
            )
        for begin in range(0, n - 1, INDEX_CHUNK):
            part = self.document_index[begin : begin + INDEX_CHUNK + 1]
            falling = part[1:] < part[:-1]
            if falling.any():
                i = int(np.argmax(falling))
                raise self._damage(f"has a document index that falls from {part[i]} to {part[i + 1]} at {begin + i}")

    def _damage(self, what: str) -> DataError:
        return DataError(f"{self.idx_path}: {what}; write or copy the dataset again")

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_index) - 1

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, i: int) -> npt.NDArray[np.integer]:
        """Tokens of sequence i."""
        begin = int(self.offsets[i]) // self.dtype.itemsize
        return self._tokens[begin : begin + int(self.lengths[i])]

    def tokens(self, begin: int, end: int) -> npt.NDArray[np.integer]:
        """Tokens begin to end (exclusive) of all sequences back to back; a view of the map."""
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"{self.bin_path}: tokens [{begin}, {end}) lie outside of [0, {self.num_tokens})")
        return self._tokens[begin:end]


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
        _check_ids(tokens, self.vocab_size, self.prefix, self.num_tokens)
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
    """Give the files of a prepared dataset their names, the index last; done again it changes nothing."""
    if os.path.exists(temporary["bin"]):
        Path(f"{prefix}.idx").unlink(missing_ok=True)  # an older index must not meet the new tokens
        os.replace(temporary["bin"], f"{prefix}.bin")
    if os.path.exists(temporary["idx"]):
        _sync_directory(Path(prefix).parent)  # the tokens' name reaches the disk before the index's
        os.replace(temporary["idx"], f"{prefix}.idx")
    Path(temporary["lengths"]).unlink(missing_ok=True)
    _sync_directory(Path(prefix).parent)


class TokenStream:
    """Several datasets one after the other as one stream of tokens.

    With `vocab_size`, every read is checked against it. Raises DataError for damaged files and ids out of range.
    """

    def __init__(self, prefixes: Sequence[str], vocab_size: int | None = None) -> None:
        self.datasets = [IndexedDataset(prefix) for prefix in prefixes]
        self.vocab_size = vocab_size
        self._ends = np.cumsum([dataset.num_tokens for dataset in self.datasets], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1]) if self.datasets else 0

    def read(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens begin to end (exclusive) of the whole stream, across the borders of files."""
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"tokens [{begin}, {end}) lie outside of [0, {self.num_tokens})")
        out = np.empty(end - begin, dtype=np.int64)
        position = begin
        for i in range(int(np.searchsorted(self._ends, begin, side="right")), len(self.datasets)):
            if position == end:
                break
            dataset = self.datasets[i]
            start = int(self._ends[i]) - dataset.num_tokens
            stop = min(end, int(self._ends[i]))
            part = dataset.tokens(position - start, stop - start)
            if self.vocab_size is not None:
                _check_ids(part, self.vocab_size, dataset.bin_path, position - start)
            out[position - begin : stop - begin] = part
            position = stop
        return out

    def check_vocab(self, vocab_size: int) -> None:
        """Raise DataError for an id that the vocabulary lacks.

        Of a stream over 64 MiB only the first and last 64 KiB of each file are read, since every rank does it at every
        start; `read` checks the rest as it comes.
        """
        is_small = sum(dataset.num_tokens * dataset.dtype.itemsize for dataset in self.datasets) <= FULL_SCAN_BYTES
        for dataset in self.datasets:
            n, edge = dataset.num_tokens, EDGE_SCAN_BYTES // dataset.dtype.itemsize
            for begin in range(0, n, edge) if is_small else (0, max(n - edge, 0)):
                _check_ids(dataset.tokens(begin, min(n, begin + edge)), vocab_size, dataset.bin_path, begin)


def _check_ids(tokens: npt.NDArray[np.integer], vocab_size: int, name: str, begin: int) -> None:
    if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        i = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        raise DataError(
            f"{name}: token {begin + i} has id {tokens[i]}, but the vocabulary ends at {vocab_size - 1}; "
            "preprocess with the tokenizer that is configured"
        )


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


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
