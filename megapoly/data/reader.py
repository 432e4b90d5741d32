"""Reading token files in Megatron-LM's `.bin`/`.idx` format; indexed.py says what they hold."""

import errno
import itertools
import os
import resource
import struct
import weakref
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megapoly.data.native import NATIVE
from megapoly.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
FLOAT_CODES = (6, 7)
# Entries of the index that are checked or written at once: bounds the temporaries at billions of documents.
INDEX_CHUNK = 1 << 22
# An index of so many sequences is checked as a whole when it is opened: microseconds.
CHECKED_AT_OPENING = 4096
NO_LIMIT = (1 << 63) - 1


class IndexedDataset:
    """A pair PREFIX.bin / PREFIX.idx, opened at a cost that does not grow with it.

    Opening checks the header, both sizes and both ends of the index, which settles the number of tokens: all that
    `tokens` needs, which reads the .bin alone. The entries between are checked, all of them, before the first use of
    any (`check`; where they are few, at opening), since 10^9 documents take 20 GB. The .bin is not mapped: its pages
    would count as this process' memory, and a file that shrinks would end it by a signal instead of a DataError.
    Raises DataError where a file is missing or where header, index and .bin contradict each other.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.idx_path, self.bin_path = f"{prefix}.idx", f"{prefix}.bin"
        for path in (self.idx_path, self.bin_path):
            if not os.path.isfile(path):
                raise DataError(f"{path}: no such file; give the prefix of a .bin/.idx pair or run preprocess_data.py")
        self._is_checked = False
        try:
            self._open()
        except OSError as error:
            raise unreadable(error, self.idx_path) from None

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return IndexedDataset, (self.prefix,)  # another process opens the files itself

    def _open(self) -> None:
        self._bin = open_to_read(self.bin_path)
        weakref.finalize(self, os.close, self._bin)
        index = os.open(self.idx_path, os.O_RDONLY)
        try:
            self._read_header(index)
            self._check_ends(index, os.fstat(self._bin).st_size)
        finally:
            os.close(index)
        if self.num_sequences <= CHECKED_AT_OPENING:
            self.check()

    def _read_header(self, index: int) -> None:
        header, size = os.pread(index, HEADER.size, 0), os.fstat(index).st_size
        if len(header) < HEADER.size:
            raise self.damage(f"is {size} bytes long, shorter than its header of {HEADER.size}")
        magic, version, code, n_sequences, n_entries = HEADER.unpack(header)
        if magic != MAGIC:
            raise self.damage(f"starts with {magic!r}, not with {MAGIC!r}: this is no Megatron-LM index")
        if version != VERSION:
            raise self.damage(f"has version {version}; only version {VERSION} is known")
        if code not in DTYPES:
            kind = "holds floating-point numbers, not tokens" if code in FLOAT_CODES else "is unknown"
            raise self.damage(f"has dtype code {code}, which {kind} (known: {sorted(DTYPES)})")
        expected = HEADER.size + 12 * n_sequences + 8 * n_entries
        if size != expected:
            raise self.damage(
                f"is {size} bytes long, but {n_sequences} sequences and {n_entries} document entries need {expected}"
            )
        if n_entries == 0:
            raise self.damage("has 0 document entries; at least 1 is needed")
        self.dtype, self.num_sequences, self.num_documents = DTYPES[code], n_sequences, n_entries - 1
        self._kind = f"{self.dtype.kind}{self.dtype.itemsize}"

    def _check_ends(self, index: int, size: int) -> None:
        """The first and last entries of the index, against the size of the .bin."""

        def entry(layout: str, position: int) -> int:
            data = os.pread(index, struct.calcsize(layout), position)
            if len(data) < struct.calcsize(layout):
                raise self.damage(f"ended at byte {position + len(data)} while it was read")
            return int(struct.unpack(layout, data)[0])

        n, item, expected = self.num_sequences, self.dtype.itemsize, 0
        if n:
            offsets = HEADER.size + 4 * n
            first, start = entry("<q", offsets), entry("<q", offsets + 8 * (n - 1))
            length = entry("<i", HEADER.size + 4 * (n - 1))
            if first != 0:
                raise self.damage(f"puts sequence 0 at byte {first}, not at 0")
            if length < 0:
                raise self.damage(f"gives sequence {n - 1} the length {length}; lengths must be at least 0")
            if start < 0 or start % item:
                raise self.damage(f"puts sequence {n - 1} at byte {start}, where no token of {item} bytes begins")
            expected = start + length * item
        if size != expected:
            raise DataError(
                f"{self.bin_path}: is {size} bytes long, but {self.idx_path} describes {expected}; "
                "write or copy the pair again"
            )
        self.num_tokens = size // item
        documents = HEADER.size + 12 * n
        head, last = entry("<q", documents), entry("<q", documents + 8 * self.num_documents)
        if head != 0 or last != n:
            raise self.damage(f"has a document index from {head} to {last}; it must run from 0 to {n}")

    @cached_property
    def _index(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        n, entries = self.num_sequences, self.num_documents + 1
        ends = np.cumsum([HEADER.size, 4 * n, 8 * n, 8 * entries])
        try:
            if n <= CHECKED_AT_OPENING:
                index = np.fromfile(self.idx_path, dtype=np.uint8)
            else:
                index = np.asarray(np.memmap(self.idx_path, dtype=np.uint8, mode="r"))
        except OSError as error:
            raise unreadable(error, self.idx_path) from None
        except ValueError:  # memmap's, for an empty file
            raise self.damage("became empty since it was opened") from None
        if len(index) != ends[-1]:
            raise self.damage(f"is {len(index)} bytes long, not {ends[-1]} as it was when it was opened")
        lengths, offsets, documents = (index[begin:end] for begin, end in itertools.pairwise(ends))
        return lengths.view("<i4"), offsets.view("<i8"), documents.view("<i8")

    def check(self) -> None:
        """Check every entry of the index, once; takes time and page cache in proportion to the sequences."""
        if not self._is_checked:
            self._check_sequences()
            self._check_documents()
            self._is_checked = True

    def _check_sequences(self) -> None:
        all_lengths, all_offsets, _ = self._index
        item, expected, size = self.dtype.itemsize, 0, self.num_tokens * self.dtype.itemsize
        for begin in range(0, self.num_sequences, INDEX_CHUNK):
            lengths = all_lengths[begin : begin + INDEX_CHUNK].astype(np.int64)
            offsets = all_offsets[begin : begin + INDEX_CHUNK]
            if lengths.min() < 0:
                i = int(np.argmax(lengths < 0))
                raise self.damage(f"gives sequence {begin + i} the length {lengths[i]}; lengths must be at least 0")
            ends = expected + np.cumsum(lengths) * item
            starts = ends - lengths * item
            wrong = offsets != starts
            if wrong.any():
                i = int(np.argmax(wrong))
                raise self.damage(f"puts sequence {begin + i} at byte {offsets[i]}, not at {starts[i]}")
            expected = int(ends[-1])
            if expected > size:
                break
        if expected != size:  # the ends of the index are those of opening, or the file changed since
            raise self.damage(f"describes {expected} bytes, but {self.bin_path} had {size} when it was opened")

    def _check_documents(self) -> None:
        documents = self._index[2]
        if documents[0] != 0 or documents[-1] != self.num_sequences:
            raise self.damage("changed its document index since it was opened")
        for begin in range(0, self.num_documents, INDEX_CHUNK):
            part = documents[begin : begin + INDEX_CHUNK + 1]
            falling = part[1:] < part[:-1]
            if falling.any():
                i = int(np.argmax(falling))
                raise self.damage(f"has a document index that falls from {part[i]} to {part[i + 1]} at {begin + i}")

    def damage(self, what: str) -> DataError:
        """What is wrong with the index, as an error."""
        return DataError(f"{self.idx_path}: {what}; write or copy the dataset again")

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, checked."""
        self.check()
        return self._index[0]

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """The byte of the .bin at which each sequence begins, checked."""
        self.check()
        return self._index[1]

    @property
    def document_index(self) -> npt.NDArray[np.int64]:
        """The first sequence of each document, and the number of sequences, checked."""
        self.check()
        return self._index[2]

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, i: int) -> npt.NDArray[np.integer]:
        """Tokens of sequence i."""
        begin = int(self.offsets[i]) // self.dtype.itemsize
        return self.tokens(begin, begin + int(self.lengths[i]))

    def read(self, begin: int, end: int, vocab_size: int | None = None) -> npt.NDArray[np.int64]:
        """`tokens` as int64, checked against a vocabulary: DataError names an id that it lacks."""
        if NATIVE.module is not None and 0 <= begin <= end <= self.num_tokens:
            limit = NO_LIMIT if vocab_size is None else vocab_size
            found = NATIVE.module.read_tokens(self._bin, begin, end - begin, self._kind, limit)
            if found is not None:
                return found
        # Without the extension, and to say what is wrong where it finds something.
        tokens = self.tokens(begin, end)
        if vocab_size is not None:
            check_ids(tokens, vocab_size, self.bin_path, begin)
        return tokens.astype(np.int64)

    def tokens(self, begin: int, end: int) -> npt.NDArray[np.integer]:
        """Tokens begin to end (exclusive) of all sequences back to back, read-only."""
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"{self.bin_path}: tokens [{begin}, {end}) lie outside of [0, {self.num_tokens})")
        item = self.dtype.itemsize
        size, position = (end - begin) * item, begin * item
        try:
            data = os.pread(self._bin, size, position)
            if len(data) < size:  # Linux reads at most 2 GiB at once
                data = self._read_on(data, size, position)
        except OSError as error:
            raise unreadable(error, self.bin_path) from None
        return np.frombuffer(data, self.dtype)

    def _read_on(self, data: bytes, size: int, position: int) -> bytes:
        parts, missing = [data], size - len(data)
        while missing:
            parts.append(os.pread(self._bin, missing, position + size - missing))
            if not parts[-1]:
                raise DataError(
                    f"{self.bin_path}: ends at byte {position + size - missing}, before its {self.num_tokens} tokens: "
                    "it became shorter since it was opened; write or copy the pair again"
                )
            missing -= len(parts[-1])
        return b"".join(parts)


def check_ids(tokens: npt.NDArray[np.integer], vocab_size: int, name: str, begin: int) -> None:
    """Raise DataError for an id that is negative or beyond the vocabulary, in one pass where there is none."""
    if not len(tokens):
        return
    unsigned, limit = tokens, vocab_size
    if tokens.dtype.kind == "i":  # read without its sign a negative id exceeds every other
        unsigned = tokens.view(f"u{tokens.dtype.itemsize}")
        limit = min(vocab_size, 1 << (8 * tokens.dtype.itemsize - 1))
    if np.maximum.reduce(unsigned) >= limit:
        i = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        raise DataError(
            f"{name}: token {begin + i} has id {tokens[i]}, but the vocabulary ends at {vocab_size - 1}; "
            "preprocess with the tokenizer that is configured"
        )


def unreadable(error: OSError, path: str) -> DataError:
    """What the system says of a file, as an error."""
    advice = "; raise the limit, `ulimit -n`" if error.errno == errno.EMFILE else ""
    return DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}{advice}")


def open_to_read(path: str) -> int:
    """A file descriptor that stays open; thousands of them leave the process room for others of its own."""
    handle = os.open(path, os.O_RDONLY)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and 2 * handle > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return handle
