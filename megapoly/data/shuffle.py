"""A shuffle of documents on disk that holds no corpus in memory: an external sort by a keyed hash of their numbers.

Document n gets the key hash(seed, n), and the order of the keys is the new order. Documents are dealt into files by the
range in which their keys fall; a file small enough is sorted in memory, a larger one dealt again. The order depends on
the seed and on nothing else, not on how much memory was used. Documents of one number stay together, in the order in
which they came.
"""

import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

LEAF_BYTES = 32 << 20
READ_BYTES = 8 << 20
READ_DOCUMENTS = 1 << 16
DOCUMENT_BYTES = 256  # what a document takes in memory beside its tokens
MOST_FILES = 128
KINDS = ("bin", "lengths", "numbers")
FEW_DOCUMENTS = 256  # so few are fetched one by one, however long they are
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def document_keys(seed: int, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014) of document numbers under a seed, as uint64."""
    start = int(_mix(np.array([seed & _MASK], dtype=np.uint64))[0])
    with np.errstate(over="ignore"):
        return _mix(np.uint64(start) + (numbers + np.uint64(1)) * np.uint64(_GOLDEN))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Pile:
    """Documents on disk: tokens, lengths (<i4) and, where they are not those of their order, numbers (<u8)."""

    def __init__(self, tokens: str, lengths: str, numbers: str | None = None, is_passing: bool = False) -> None:
        self.tokens_path, self.lengths_path, self.numbers_path = tokens, lengths, numbers
        self.is_passing = is_passing
        self.bytes = os.path.getsize(tokens)
        self.documents = os.path.getsize(lengths) // 4

    def lengths(self, begin: int, count: int) -> npt.NDArray[np.int64]:
        return np.fromfile(self.lengths_path, "<i4", count, offset=4 * begin).astype(np.int64)

    def numbers(self, begin: int, count: int) -> npt.NDArray[np.uint64]:
        if self.numbers_path is None:
            return np.arange(begin, min(begin + count, self.documents), dtype=np.uint64)
        return np.fromfile(self.numbers_path, "<u8", count, offset=8 * begin)

    def remove(self) -> None:
        """Free the space of what was only made on the way."""
        if self.is_passing and self.numbers_path is not None:
            for path in (self.tokens_path, self.lengths_path, self.numbers_path):
                os.unlink(path)


def shuffle_documents(stem: str, itemsize: int, seed: int, leaf_bytes: int = LEAF_BYTES) -> str:
    """Write the documents of STEM.bin / STEM.lengths in the order of the seed to STEM.shuffled.*; returns that stem.

    Both files are on the disk at the end. What an earlier attempt left is begun anew. Beside its result it takes about
    as much space on the disk as STEM.bin has, and less and less of it as the result grows.
    """
    out = f"{stem}.shuffled"
    sort_documents(Pile(f"{stem}.bin", f"{stem}.lengths"), out, ("bin", "lengths"), itemsize, seed, leaf_bytes)
    return out


def sort_documents(
    pile: Pile, out: str, kinds: Sequence[str], itemsize: int, seed: int, leaf_bytes: int = LEAF_BYTES
) -> None:
    """Write a pile in the order of its numbers' keys to OUT.bin, OUT.lengths and, if among the kinds, OUT.numbers."""
    folder = Path(f"{out}.buckets")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with ExitStack() as stack:
        files = [stack.enter_context(open(f"{out}.{kind}", "wb")) for kind in kinds]
        _sort(pile, str(folder / "x"), (0, 2**64), itemsize, seed, leaf_bytes, files)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(folder)


def _sort(
    pile: Pile,
    stem: str,
    keys: tuple[int, int],
    itemsize: int,
    seed: int,
    leaf_bytes: int,
    out: Sequence[io.BufferedWriter],
) -> None:
    """Write the pile, whose keys lie in that range, behind what `out` has; what it is dealt into is STEM-NNN.*."""
    low, high = keys
    is_small = pile.bytes <= leaf_bytes and pile.documents <= leaf_bytes // DOCUMENT_BYTES
    if is_small or pile.documents <= FEW_DOCUMENTS or high - low == 1:
        _write_sorted(pile, itemsize, seed, leaf_bytes, out)
        pile.remove()
        return
    parts = min(MOST_FILES, 2 + 2 * max(pile.bytes, DOCUMENT_BYTES * pile.documents) // leaf_bytes, high - low)
    bounds = [low + (high - low) * i // parts for i in range(parts + 1)]
    parts_of = _deal(pile, stem, bounds, itemsize, seed)
    pile.remove()
    for i, part in enumerate(parts_of):
        dealt = Pile(f"{part}.bin", f"{part}.lengths", f"{part}.numbers", is_passing=True)
        _sort(dealt, part, (bounds[i], bounds[i + 1]), itemsize, seed, leaf_bytes, out)


def _deal(pile: Pile, stem: str, bounds: list[int], itemsize: int, seed: int) -> list[str]:
    """Write each document to the file in whose range its key lies."""
    stems = [f"{stem}-{i:03d}" for i in range(len(bounds) - 1)]
    inner = np.array(bounds[1:-1], dtype=np.uint64)
    files = [[open(f"{part}.{kind}", "wb", buffering=0) for kind in KINDS] for part in stems]  # noqa: SIM115
    try:
        for numbers, lengths, tokens in _pieces(pile, itemsize):
            part = np.searchsorted(inner, document_keys(seed, numbers), side="right")
            order = np.argsort(part, kind="stable")
            borders = np.searchsorted(part[order], np.arange(len(stems) + 1))
            documents = _split(tokens, lengths * itemsize)
            for i, (tokens_file, lengths_file, numbers_file) in enumerate(files):
                chosen = order[borders[i] : borders[i + 1]]
                if len(chosen):
                    _write_all(tokens_file, b"".join([documents[k] for k in chosen.tolist()]))
                    _write_all(lengths_file, lengths[chosen].astype("<i4").tobytes())
                    _write_all(numbers_file, numbers[chosen].astype("<u8").tobytes())
    finally:
        for row in files:
            for file in row:
                file.close()
    return stems


def _pieces(pile: Pile, itemsize: int) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], memoryview]]:
    """(numbers, lengths, bytes of the tokens) of some documents at a time, of at least one."""
    with open(pile.tokens_path, "rb") as file:
        begin = 0
        while begin < pile.documents:
            lengths = pile.lengths(begin, READ_DOCUMENTS)
            fitting = int(np.searchsorted(np.cumsum(lengths) * itemsize, READ_BYTES, side="right"))
            lengths = lengths[: max(1, fitting)]
            yield pile.numbers(begin, len(lengths)), lengths, memoryview(file.read(int(lengths.sum()) * itemsize))
            begin += len(lengths)


def _split(tokens: memoryview, sizes: npt.NDArray[np.int64]) -> list[memoryview]:
    ends = np.cumsum(sizes)
    return [tokens[a:b] for a, b in zip((ends - sizes).tolist(), ends.tolist(), strict=True)]


def _write_sorted(pile: Pile, itemsize: int, seed: int, leaf_bytes: int, out: Sequence[io.BufferedWriter]) -> None:
    lengths, numbers = pile.lengths(0, pile.documents), pile.numbers(0, pile.documents)
    order = np.argsort(document_keys(seed, numbers), kind="stable")  # equal keys stay in the order of the corpus
    with open(pile.tokens_path, "rb") as file:
        if pile.bytes <= leaf_bytes:
            documents = _split(memoryview(file.read()), lengths * itemsize)
            out[0].write(b"".join([documents[k] for k in order.tolist()]))
        else:
            ends = np.cumsum(lengths) * itemsize
            for k in order.tolist():
                file.seek(int(ends[k]) - int(lengths[k]) * itemsize)
                out[0].write(file.read(int(lengths[k]) * itemsize))
    out[1].write(lengths[order].astype("<i4").tobytes())
    for numbers_file in out[2:]:
        numbers_file.write(numbers[order].astype("<u8").tobytes())


def _write_all(file: io.FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
