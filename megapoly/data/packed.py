"""Reading rows of packed documents (packing.py): a document of such a pair's index is a row, one sample.

Beside the pair lies PREFIX.pack.json: `format`, the `pack_length` it was made for, and the `rows` and `tokens` of the
pair that it belongs to. So a set that was packed for other samples, or not at all, is known when it is opened.
"""

import itertools
import json
import os
import struct
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from megapoly.data.indexed import PACK_NOTE, TokenStream
from megapoly.data.reader import HEADER, IndexedDataset, open_to_read, unreadable
from megapoly.errors import DataError

FORMAT = 1
AGAIN = "write or copy the dataset again"


@dataclass(frozen=True)
class PackNote:
    """What PREFIX.pack.json says of the pair beside it."""

    pack_length: int
    rows: int
    tokens: int


def write_note(path: str, note: PackNote) -> None:
    """Write a note and bring it to the disk."""
    with open(path, "w", encoding="ascii") as file:
        json.dump({"format": FORMAT} | asdict(note), file)
        file.flush()
        os.fsync(file.fileno())


def read_note(prefix: str) -> PackNote | None:
    """The note beside a pair, None where there is none; DataError where it is damaged."""
    path = prefix + PACK_NOTE
    if not os.path.lexists(path):
        return None
    if not os.path.isfile(path):  # a pipe would be waited for
        raise DataError(f"{path}: is no regular file; {AGAIN}")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.loads(file.read(4096))
    except OSError as error:
        raise unreadable(error, path) from None
    except (ValueError, RecursionError):
        found = None
    names = ("pack_length", "rows", "tokens")
    if not isinstance(found, dict) or not all(type(found.get(n)) is int and found[n] > 0 for n in ("format", *names)):
        raise DataError(f"{path}: is damaged; {AGAIN}")
    if found["format"] != FORMAT:
        raise DataError(f"{path}: has format {found['format']}; only format {FORMAT} is known")
    return PackNote(*(found[name] for name in names))


def check_note(note: PackNote, dataset: IndexedDataset, longest: int = 0) -> None:
    """Raise DataError where a note is not that of a pair, whose longest row may be given."""
    path, has = dataset.prefix + PACK_NOTE, (dataset.num_documents, dataset.num_tokens)
    if (note.rows, note.tokens) != has:
        raise DataError(
            f"{path}: belongs to a pair of {note.rows} rows and {note.tokens} tokens, and this one has {has[0]} and "
            f"{has[1]}; {AGAIN}"
        )
    if longest > note.pack_length + 1:
        raise DataError(
            f"{path}: says that rows are for samples of {note.pack_length} tokens, and one has {longest}, more than "
            f"that and one; {AGAIN}"
        )


class PackedDataset(IndexedDataset):
    """A pair whose documents are rows for samples of `length` tokens; of the index only a row's entries are read.

    Raises DataError for a pair that is not packed, or for samples of another length.
    """

    def __init__(self, prefix: str, length: int) -> None:
        super().__init__(prefix)
        self.pack_length, note = length, read_note(prefix)
        if note is None:
            raise DataError(
                f"{prefix}{PACK_NOTE}: no such file, so the pair is not packed; "
                "write it by preprocess_data.py --pack-length, or remove `packed: true` from its source"
            )
        if note.pack_length != length:
            raise DataError(
                f"{prefix}: is packed for samples of {note.pack_length} tokens, not of {length} (block_length); "
                f"write it again with --pack-length {length}, or give --block-length {note.pack_length}"
            )
        check_note(note, self)

    def __reduce__(self) -> tuple[type, tuple[str, int]]:  # type: ignore[override]
        return PackedDataset, (self.prefix, self.pack_length)

    def _open(self) -> None:
        super()._open()
        self._index_file = open_to_read(self.idx_path)
        weakref.finalize(self, os.close, self._index_file)

    def row(self, number: int) -> tuple[int, int]:
        """Where a row begins and ends in the tokens, at least one and at most pack_length + 1 of them."""
        n, item = self.num_sequences, self.dtype.itemsize
        first, end = self._entries(HEADER.size + 12 * n + 8 * number, 2)
        if not 0 <= first < end <= n:
            raise self.damage(f"gives row {number} the sequences {first} to {end}, of {n}")
        offsets = HEADER.size + 4 * n
        begin = self._entries(offsets + 8 * first, 1)[0]
        until = self._entries(offsets + 8 * end, 1)[0] if end < n else self.num_tokens * item
        size = until - begin
        if begin % item or size % item or not 0 <= begin < until <= self.num_tokens * item:
            raise self.damage(f"puts row {number} at bytes {begin} to {until}")
        if size > (self.pack_length + 1) * item:
            raise self.damage(f"has row {number} of {size // item} tokens, more than {self.pack_length} + 1")
        return begin // item, until // item

    def _entries(self, position: int, count: int) -> tuple[int, ...]:
        try:
            data = os.pread(self._index_file, 8 * count, position)
        except OSError as error:
            raise unreadable(error, self.idx_path) from None
        if len(data) < 8 * count:
            raise self.damage(f"ended at byte {position + len(data)} while it was read")
        return struct.unpack(f"<{count}q", data)


class PackedStream(TokenStream):
    """Rows of several packed datasets as one stream of places: row k has the places kL to kL + L inclusive.

    So it is read as a stream of tokens is, whose slice k these are; a short row gives less than was asked for.
    """

    datasets: Sequence[PackedDataset]  # type: ignore[assignment]

    def __init__(self, prefixes: Sequence[str], length: int, vocab_size: int | None = None) -> None:
        self.datasets = [PackedDataset(prefix, length) for prefix in prefixes]
        self.vocab_size, self.length = vocab_size, length
        self._ends = list(itertools.accumulate(dataset.num_tokens for dataset in self.datasets))
        self._row_ends = list(itertools.accumulate(dataset.num_documents for dataset in self.datasets))
        self.num_rows = self._row_ends[-1]

    def read(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens at the places begin to end (exclusive) of one row, as many of them as it has."""
        number, skipped = divmod(begin, self.length)
        if not 0 <= number < self.num_rows or not 0 < end - begin <= self.length + 1 - skipped:
            raise IndexError(
                f"places [{begin}, {end}) lie in no row of the {self.num_rows} of {self.length} + 1 places"
            )
        i = bisect_right(self._row_ends, number)
        dataset = self.datasets[i]
        first, until = dataset.row(number - self._row_ends[i] + dataset.num_documents)
        return dataset.read(min(first + skipped, until), min(first + skipped + end - begin, until), self.vocab_size)
