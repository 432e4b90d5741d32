"""Best-fit packing: documents whole into rows of one sample (Ding et al. 2024, arXiv 2404.10830).

A row holds at most `length` + 1 tokens, as any slice does: `length` to read, and one more for the last label. Only
a longer document is cut, into pieces that fill a row each and what is left. Pieces go from the longest to the shortest
into the row that is fullest of those with room for them. Which rows this makes depends on the number of pieces of each
length alone, so rows of equal room are filled together, without a look at single documents.
"""

import os
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megapoly.data.mending import write_index
from megapoly.data.shuffle import LEAF_BYTES, Pile, sort_documents

READ_DOCUMENTS = 1 << 16
Int64s = npt.NDArray[np.int64]
Rows = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Packing:
    """What came of packing: `rows` of at most `pack_length` + 1 tokens, in them `pieces` of documents, some `cut`."""

    pack_length: int
    rows: int
    tokens: int
    pieces: int
    documents: int
    cut: int

    @property
    def fullness(self) -> float:
        """Part of the samples' places that text fills: a row of n tokens has n - 1 to predict."""
        return (self.tokens - self.rows) / (self.rows * self.pack_length)

    def __str__(self) -> str:
        return (
            f"{self.documents} documents in {self.rows} rows for samples of {self.pack_length} tokens, "
            f"{self.fullness:.2%} full; {self.cut} longer than a row and cut"
        )


def best_fit(counts: npt.NDArray[np.integer]) -> tuple[Rows, int]:
    """Rows by best-fit decreasing; counts[n] is the number of pieces of n tokens, a row holds len(counts) - 1.

    Returns the row of each piece that is shorter than a row, sorted by its length, and the number of rows; the pieces
    that fill a row have the first ones, in their order. Takes 4 to 12 bytes a piece.
    """
    capacity, rows = len(counts) - 1, int(counts[-1])
    begins = np.append(0, np.cumsum(counts[:-1], dtype=np.int64))
    row_of: Rows = np.empty(int(begins[-1]), np.uint32 if rows + begins[-1] < 1 << 32 else np.uint64)
    by_room: dict[int, list[Rows]] = {}
    rooms: list[int] = []  # those of by_room, sorted

    def put_back(some: Rows, room: int) -> None:
        if len(some) and room:
            if room not in by_room:
                insort(rooms, room)
            by_room.setdefault(room, []).append(some)

    for size in range(capacity - 1, 0, -1):
        left = row_of[begins[size] : begins[size + 1]]
        while len(left):
            at = bisect_left(rooms, size)
            if at == len(rooms):
                needed = -(-len(left) // (capacity // size))
                put_back(np.arange(rows, rows + needed, dtype=row_of.dtype), capacity)
                rows += needed
            room = rooms[at]
            some = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
            each = room // size  # a row with room stays the fullest with room for as many pieces of this size
            filled = min(len(some), len(left) // each)
            left[: filled * each] = np.repeat(some[:filled], each)
            put_back(some[:filled], room - each * size)
            left, some = left[filled * each :], some[filled:]
            if len(left) and len(some):
                left[:] = some[0]
                put_back(some[:1], room - len(left) * size)
                left, some = left[:0], some[1:]
            put_back(some, room)
    return row_of, rows


def pack_documents(stem: str, dtype: np.dtype, length: int, seed: int, leaf_bytes: int = LEAF_BYTES) -> Packing:
    """Write the documents of STEM.bin / STEM.lengths as rows to STEM.packed.bin / .idx, in the order of the seed.

    A row is a document of the index and its texts are the sequences of that. Everything is on the disk at the end; what
    an earlier attempt left is begun anew. It takes 4 to 12 bytes of memory a document.
    """
    counts, documents, cut = _count(stem, length + 1)
    row_of, rows = best_fit(counts)
    numbered = f"{stem}.pieces"
    _number(stem, numbered, counts, row_of)
    del row_of
    pile, out = Pile(f"{stem}.bin", f"{numbered}.lengths", f"{numbered}.numbers"), f"{stem}.packed"
    sort_documents(pile, out, ("bin", "lengths", "numbers"), dtype.itemsize, seed, leaf_bytes)
    lengths = np.memmap(f"{out}.lengths", "<i4", "r")
    write_index(f"{out}.idx", dtype, [(lengths, _first_pieces(f"{out}.numbers", f"{out}.rows", rows))])
    for path in (f"{numbered}.lengths", f"{numbered}.numbers", f"{out}.numbers", f"{out}.rows"):
        Path(path).unlink()
    tokens = os.path.getsize(f"{out}.bin") // dtype.itemsize
    return Packing(length, rows, tokens, len(lengths), documents, cut)


def _pieces(stem: str, capacity: int) -> Iterator[tuple[Int64s, Int64s]]:
    """Lengths of some documents at a time, and of the pieces that they are cut into."""
    begin = 0
    while len(lengths := np.fromfile(f"{stem}.lengths", "<i4", READ_DOCUMENTS, offset=4 * begin).astype(np.int64)):
        numbers = -(-lengths // capacity)
        pieces = np.full(int(numbers.sum()), capacity)
        pieces[np.cumsum(numbers) - 1] = lengths - (numbers - 1) * capacity
        yield lengths, pieces
        begin += len(lengths)


def _count(stem: str, capacity: int) -> tuple[Int64s, int, int]:
    """Pieces of each length, and how many documents there are and are cut."""
    counts, documents, cut = np.zeros(capacity + 1, np.int64), 0, 0
    for lengths, pieces in _pieces(stem, capacity):
        counts += np.bincount(pieces, minlength=capacity + 1)
        documents += len(lengths)
        cut += int(np.count_nonzero(lengths > capacity))
    return counts, documents, cut


def _number(stem: str, out: str, counts: Int64s, row_of: Rows) -> None:
    """Write the length and the row of each piece; those of one length are taken as they come."""
    capacity = len(counts) - 1
    following = np.append(0, np.cumsum(counts[:-1]))  # of each length, the place of its next piece in row_of
    following[capacity] = 0  # these have rows of their own, from 0 on
    with open(f"{out}.lengths", "wb") as lengths_file, open(f"{out}.numbers", "wb") as numbers_file:
        for _, pieces in _pieces(stem, capacity):
            order = np.argsort(pieces, kind="stable")
            sizes, met = np.unique(pieces, return_counts=True)
            earlier = np.arange(len(pieces)) - np.repeat(np.cumsum(met) - met, met)
            places = np.empty(len(pieces), np.int64)
            places[order] = np.repeat(following[sizes], met) + earlier
            following[sizes] += met
            is_row = pieces == capacity
            numbers = places.astype("<u8")
            numbers[~is_row] = row_of[places[~is_row]]
            lengths_file.write(pieces.astype("<i4").tobytes())
            numbers_file.write(numbers.tobytes())


def _first_pieces(numbers: str, out: str, rows: int) -> npt.NDArray[np.integer]:
    """The first piece of each row, and the number of pieces: on the disk, as it may be long."""
    begin, last = 0, -1
    with open(out, "wb") as file:
        while len(some := np.fromfile(numbers, "<u8", READ_DOCUMENTS, offset=8 * begin)):
            is_first = np.append(int(some[0]) != last, some[1:] != some[:-1])
            file.write((np.flatnonzero(is_first) + begin).astype("<i8").tobytes())
            begin, last = begin + len(some), int(some[-1])
        file.write(np.array([begin], "<i8").tobytes())
    found: npt.NDArray[np.integer] = np.memmap(out, "<i8", "r")
    assert len(found) == rows + 1, (len(found), rows)
    return found
