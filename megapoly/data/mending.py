"""Pairs of .bin/.idx put together, and what can be saved of a damaged one.

Both write under temporary names, bring the bytes to the disk and rename, the index last.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megapoly.data.indexed import CODES, PACK_NOTE, publish, sync_directory
from megapoly.data.packed import PackNote, check_note, read_note, write_note
from megapoly.data.reader import DTYPES, HEADER, INDEX_CHUNK, MAGIC, VERSION, IndexedDataset
from megapoly.errors import DataError

COPIED_AT_ONCE = 1 << 24
# Lengths of the sequences, and the first sequence of each document with their number at the end.
Index = tuple[NDArray[np.integer], NDArray[np.integer]]


def write_index(path: str, dtype: np.dtype, parts: Sequence[Index]) -> None:
    """The index of some datasets, one after the other, brought to the disk."""
    sequences, documents = sum(len(lengths) for lengths, _ in parts), sum(len(index) - 1 for _, index in parts)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, documents + 1))
        for chunk in _chunks([lengths for lengths, _ in parts]):
            file.write(chunk.astype("<i4").tobytes())
        position = 0
        for chunk in _chunks([lengths for lengths, _ in parts]):
            ends = position + np.cumsum(chunk, dtype="<i8") * dtype.itemsize
            file.write(np.append(np.int64(position), ends[:-1]).astype("<i8").tobytes())
            position = int(ends[-1])
        first = 0
        for lengths, index in parts:
            for chunk in _chunks([index[:-1]]):
                file.write((chunk.astype("<i8") + first).tobytes())
            first += len(lengths)
        file.write(np.array([first], "<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())


def _chunks(arrays: Sequence[NDArray[np.integer]]) -> Iterator[NDArray[np.integer]]:
    for array in arrays:
        for begin in range(0, len(array), INDEX_CHUNK):
            yield array[begin : begin + INDEX_CHUNK]


# ------------------------------------------------------------------------------------------------------ merging


def merge(prefixes: Sequence[str], output: str) -> tuple[int, int]:
    """Write the datasets one after the other as the dataset `output`; returns its (documents, tokens).

    Packed ones of one length are packed together. Raises DataError where one is damaged, where they hold different
    types of ids or are packed otherwise than the others, where one comes twice, or where output is one of them.
    """
    if not prefixes:
        raise DataError("there is nothing to merge: give the prefixes of .bin/.idx pairs")
    seen: set[str] = set()
    for prefix in prefixes:
        path = os.path.realpath(f"{prefix}.bin")
        if path in seen:
            raise DataError(f"{prefix}: is given twice; give each dataset once and weights in the curriculum")
        seen.add(path)
    if os.path.realpath(f"{output}.bin") in seen:
        raise DataError(f"{output}: is one of the datasets that are merged; give another output prefix")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    for dataset in datasets[1:]:
        if dataset.dtype != datasets[0].dtype:
            raise DataError(
                f"{dataset.bin_path}: holds ids as {dataset.dtype}, but {datasets[0].bin_path} as {datasets[0].dtype}; "
                "merge datasets of one vocabulary"
            )
    note = _note_of_all(datasets)
    parts = [(dataset.lengths, dataset.document_index) for dataset in datasets]
    temporary = {kind: f"{output}.{kind}.tmp-{os.getpid()}" for kind in ("bin", "idx", "lengths", "note")}
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with open(temporary["bin"], "wb") as whole:
            for dataset in datasets:
                with open(dataset.bin_path, "rb") as file:
                    shutil.copyfileobj(file, whole, COPIED_AT_ONCE)
            size = whole.tell()
            whole.flush()
            os.fsync(whole.fileno())
        expected = sum(dataset.num_tokens * dataset.dtype.itemsize for dataset in datasets)
        if size != expected:
            raise DataError(f"{output}: {size} bytes came together instead of {expected}; is a dataset being written?")
        write_index(temporary["idx"], datasets[0].dtype, parts)
        if note is not None:
            write_note(temporary["note"], note)
        publish(output, temporary)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        for path in temporary.values():
            if os.path.exists(path):
                os.unlink(path)
    return sum(dataset.num_documents for dataset in datasets), expected // datasets[0].dtype.itemsize


def _note_of_all(datasets: Sequence[IndexedDataset]) -> PackNote | None:
    """What the merged dataset's note says, where all are packed alike."""
    prefixes = [dataset.prefix for dataset in datasets]
    notes = [read_note(prefix) for prefix in prefixes]
    for note, dataset in zip(notes, datasets, strict=True):
        if note is not None:
            check_note(note, dataset)
    lengths = [None if note is None else note.pack_length for note in notes]
    for prefix, length in zip(prefixes, lengths, strict=True):
        if length != lengths[0]:
            was, now = ("not packed" if n is None else f"packed for {n} tokens" for n in (lengths[0], length))
            raise DataError(f"{prefix}: is {now}, but {prefixes[0]} is {was}; merge datasets that are packed alike")
    packed = [note for note in notes if note is not None]
    if not packed:
        return None
    return PackNote(packed[0].pack_length, sum(note.rows for note in packed), sum(note.tokens for note in packed))


# ------------------------------------------------------------------------------------------------------ mending


@dataclass(frozen=True)
class Mended:
    """What is left of a dataset, and how many bytes of tokens were not part of a whole document."""

    documents: int
    tokens: int
    cut_bytes: int


def repair(prefix: str, dtype: np.dtype | None = None, eod: int | None = None) -> Mended:
    """Keep the documents that are whole and cut off what comes after them, in place; done again it changes nothing.

    A damaged or missing end of the index is made again from the lengths that are there. Without any, `dtype` and `eod`
    (the tokenizer's) tell documents by the tokens that end them. Raises DataError, with nothing cut off, where nothing
    tells them apart and where the index is false in its midst.
    """
    bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
    try:
        size = os.path.getsize(bin_path)
        found = _left_of_index(idx_path, size)
        if found is None:
            if dtype is None or eod is None:
                raise DataError(
                    f"{idx_path}: tells nothing of the documents in {bin_path}; "
                    "give the tokenizer, whose end-of-document token does"
                )
            lengths = _lengths_by_ends(bin_path, size, dtype, eod)
            documents: NDArray[np.integer] = np.arange(len(lengths) + 1)
        else:
            dtype, lengths, documents = found
        assert dtype is not None
        ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        whole = int(np.searchsorted(ends, size, side="right"))  # sequences that the .bin holds
        documents = documents[documents <= whole]
        whole = int(documents[-1])
        kept = int(ends[whole - 1]) if whole else 0
        _replace_pair(prefix, dtype, (lengths[:whole], documents), kept)
        _mend_note(prefix, np.diff(np.append(0, ends)[documents]) // dtype.itemsize)
    except OSError as error:
        raise DataError(f"{error.filename or prefix}: cannot be mended: {error.strerror or error}") from None
    return Mended(len(documents) - 1, kept // dtype.itemsize, size - kept)


def _replace_pair(prefix: str, dtype: np.dtype, index: Index, kept: int) -> None:
    """A kill on the way leaves a pair that is refused, and that is mended by the same call."""
    temporary = f"{prefix}.idx.tmp-{os.getpid()}"
    try:
        write_index(temporary, dtype, [index])
        with open(f"{prefix}.bin", "r+b") as file:
            if os.fstat(file.fileno()).st_size > kept:
                file.truncate(kept)
                os.fsync(file.fileno())
        os.replace(temporary, f"{prefix}.idx")
        sync_directory(Path(prefix).parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _mend_note(prefix: str, rows: NDArray[np.int64]) -> None:
    """What is left of a packed set is one, unless its rows were lost: then it is a set of documents."""
    try:
        note = read_note(prefix)
    except DataError:
        note = None
    path = prefix + PACK_NOTE
    if note is None or not len(rows) or rows.max() > note.pack_length + 1:
        Path(path).unlink(missing_ok=True)
        return
    write_note(f"{path}.tmp-{os.getpid()}", PackNote(note.pack_length, len(rows), int(rows.sum())))
    os.replace(f"{path}.tmp-{os.getpid()}", path)


def _left_of_index(path: str, bin_size: int) -> tuple[np.dtype, NDArray[np.integer], NDArray[np.integer]] | None:
    """Type, lengths and document index, as far as the file has them and they can be true; None without a header.

    Where the document index is cut off or contradicts itself, every sequence is a document. Raises DataError for
    lengths that are not those of the .bin and that the index's offsets or size contradict: that is no tail cut off.
    """
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        magic, version, code, sequences, entries = HEADER.unpack(header)
        if magic != MAGIC or version != VERSION or code not in DTYPES:
            return None
        size = os.fstat(file.fileno()).st_size
    there = min(sequences, (size - HEADER.size) // 4)
    lengths: NDArray[np.integer] = np.memmap(path, "<i4", "r", HEADER.size, (there,)) if there else np.empty(0, "<i4")
    begin = HEADER.size + 12 * sequences
    ends = np.append(0, np.cumsum(lengths, dtype=np.int64) * DTYPES[code].itemsize)
    is_false = size > begin + 8 * entries or not _agrees(path, size, sequences, ends)
    if is_false and ends[-1] != bin_size:
        raise DataError(
            f"{path}: contradicts itself and the {bin_size} bytes of the .bin, so nothing was cut off; "
            "copy it again, or remove it and give the tokenizer"
        )
    negative = np.flatnonzero(lengths < 0)
    if len(negative):
        lengths = lengths[: negative[0]]
    documents: NDArray[np.integer] = np.arange(len(lengths) + 1)
    if entries and len(lengths) == sequences and size == begin + 8 * entries:
        given = np.memmap(path, "<i8", "r", begin, (entries,))
        if given[0] == 0 and given[-1] == sequences and not (np.diff(given) < 0).any():
            documents = given
    return DTYPES[code], lengths, documents


def _agrees(path: str, size: int, sequences: int, ends: NDArray[np.int64]) -> bool:
    """Whether the offsets, as far as the index has them, are the ends of the sequences before."""
    there = min(sequences, (size - HEADER.size - 4 * sequences) // 8)
    return there <= 0 or np.array_equal(
        np.memmap(path, "<i8", "r", HEADER.size + 4 * sequences, (there,)), ends[:there]
    )


def _lengths_by_ends(path: str, size: int, dtype: np.dtype, eod: int) -> NDArray[np.integer]:
    """Lengths of the documents that end with eod; what follows the last one is none."""
    tokens = np.memmap(path, dtype, "r", 0, (size // dtype.itemsize,)) if size >= dtype.itemsize else np.empty(0, dtype)
    ends = [
        begin + 1 + np.flatnonzero(tokens[begin : begin + INDEX_CHUNK] == eod)
        for begin in range(0, len(tokens), INDEX_CHUNK)
    ]
    return np.diff(np.concatenate([[0], *ends]))
