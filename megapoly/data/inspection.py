"""A look into token files: documents and their lengths, tokens and how often they come, text, languages."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megapoly.data.packed import check_note, read_note
from megapoly.data.reader import IndexedDataset, check_ids
from megapoly.errors import DataError
from megapoly.tokenizer.load import Tokenizer

TOKENS_AT_ONCE = 1 << 22
MOST_IDS = 1 << 24  # that are counted where no tokenizer says how many there are
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
BAR_WIDTH = 40
SHOWN_CHARACTERS = 200
IDENTIFIED_TOKENS = 512  # of a document: what its language is told by


@dataclass(frozen=True)
class Inspection:
    """What a dataset holds. `counts` of ids cover `read_tokens` tokens; lengths are of documents, in tokens.

    `pack_length`: its documents are rows of packed ones, for samples of so many tokens.
    """

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    empty_documents: int
    length_percentiles: dict[int, int]
    length_histogram: list[tuple[int, int, int]]  # from, to (excluded), documents
    read_tokens: int
    pack_length: int | None
    counts: NDArray[np.int64]

    def to_json(self, tokenizer: Tokenizer | None, most: int) -> dict[str, Any]:
        """As plain data, with the `most` frequent tokens."""
        plain = {name: value for name, value in vars(self).items() if name != "counts"}
        return plain | {
            "distinct_ids": int(np.count_nonzero(self.counts)),
            "frequent_tokens": [
                {"id": id, "count": count} | ({} if tokenizer is None else {"text": tokenizer.decode([id])})
                for id, count in self.frequent(most)
            ],
        }

    def frequent(self, most: int) -> list[tuple[int, int]]:
        """(id, count) of the most frequent ids, the most frequent first."""
        order = np.argsort(-self.counts, kind="stable")[:most]
        return [(int(id), int(self.counts[id])) for id in order if self.counts[id]]


def inspect(prefix: str, vocab_size: int | None = None, max_tokens: int | None = None) -> Inspection:
    """Check a whole index, and read its tokens, or at most so many, in stretches spread evenly over them.

    Raises DataError for damage, a note of packing that is not this pair's, and an id beyond vocab_size (else MOST_IDS).
    """
    dataset, note = IndexedDataset(prefix), read_note(prefix)
    documents = document_lengths(dataset)
    if note is not None:
        check_note(note, dataset, int(documents.max(initial=0)))
    counts, read = _count_ids(dataset, vocab_size, max_tokens)
    percentiles = np.percentile(documents, PERCENTILES, method="nearest") if len(documents) else [0] * len(PERCENTILES)
    return Inspection(
        prefix=prefix,
        dtype=str(dataset.dtype),
        documents=dataset.num_documents,
        sequences=dataset.num_sequences,
        tokens=dataset.num_tokens,
        empty_documents=int(np.count_nonzero(documents == 0)),
        length_percentiles={p: int(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
        length_histogram=_histogram(documents),
        read_tokens=read,
        pack_length=None if note is None else note.pack_length,
        counts=counts,
    )


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Tokens of each document."""
    ends = np.append(0, np.cumsum(dataset.lengths, dtype=np.int64))
    return np.diff(ends[dataset.document_index])


def _count_ids(
    dataset: IndexedDataset, vocab_size: int | None, max_tokens: int | None
) -> tuple[NDArray[np.int64], int]:
    n, read, counts = dataset.num_tokens, 0, np.zeros(0, np.int64)
    limit = n if max_tokens is None else min(n, max_tokens)
    stretches = math.ceil(limit / TOKENS_AT_ONCE)
    for number in range(stretches):
        size = min(TOKENS_AT_ONCE, limit - read)
        begin = read if limit == n else (n - size) * number // max(stretches - 1, 1)
        tokens = dataset.tokens(begin, begin + size)
        check_ids(tokens, vocab_size or 1 << 31, dataset.bin_path, begin)
        highest = int(tokens.max(initial=0))
        if vocab_size is None and highest >= MOST_IDS:
            raise DataError(f"{dataset.bin_path}: has the id {highest}, beyond any vocabulary; give its tokenizer")
        found = np.bincount(tokens, minlength=len(counts))
        found[: len(counts)] += counts
        counts, read = found, read + size
    return counts, read


def _histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Documents by powers of two of their length."""
    edges = [0, *(1 << power for power in range(int(lengths.max(initial=0)).bit_length() + 1))]
    counts: NDArray[np.int64] = np.histogram(lengths, edges)[0]
    return [(low, high, int(count)) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True) if count]


def samples(prefix: str, tokenizer: Tokenizer, number: int, seed: int) -> list[tuple[int, str]]:
    """(number, text) of some documents that are not empty, drawn by the seed, in their order."""
    dataset = IndexedDataset(prefix)
    return [(i, tokenizer.decode(tokens.tolist())) for i, tokens in _draw(dataset, number, seed)]


def identified_shares(
    prefix: str, tokenizer: Tokenizer, identify: Callable[[str], str], number: int, seed: int
) -> dict[str, float]:
    """Shares of tokens by language, the largest first, as identified on so many documents drawn by the seed."""
    by_language: Counter[str] = Counter()
    for _, tokens in _draw(IndexedDataset(prefix), number, seed):
        by_language[identify(tokenizer.decode(tokens[:IDENTIFIED_TOKENS].tolist()))] += len(tokens)
    whole = by_language.total()
    return {language: count / whole for language, count in by_language.most_common()}


def _draw(dataset: IndexedDataset, number: int, seed: int) -> list[tuple[int, NDArray[np.integer]]]:
    lengths = document_lengths(dataset)
    filled = np.flatnonzero(lengths)
    chosen = np.sort(np.random.default_rng(seed).permutation(filled)[:number])
    begins = np.append(0, np.cumsum(lengths))
    return [(int(i), dataset.tokens(int(begins[i]), int(begins[i + 1]))) for i in chosen]


# ------------------------------------------------------------------------------------------------------ showing


def describe(found: Inspection, tokenizer: Tokenizer | None, most: int) -> str:
    """An inspection as lines of text."""
    lines = [
        f"{found.prefix}: whole",
        f"  {found.documents:,} documents ({found.empty_documents:,} empty), {found.tokens:,} tokens ({found.dtype})",
    ]
    if found.sequences != found.documents:
        lines.append(f"  {found.sequences:,} sequences")
    if found.pack_length is not None:
        lines.append(
            f"  packed: its documents are rows, its sequences texts, for samples of {found.pack_length:,} tokens"
        )
    middle = ", ".join(f"{p}%: {length:,}" for p, length in found.length_percentiles.items())
    lines.append(f"  tokens of a document  {middle}")
    highest = max((count for *_, count in found.length_histogram), default=1)
    for low, high, count in found.length_histogram:
        bar = "#" * math.ceil(BAR_WIDTH * count / highest)
        lines.append(f"  {low:>11,} to {high - 1:>11,}  {count:>13,}  {bar}")
    part = "" if found.read_tokens == found.tokens else f" in {found.read_tokens:,} of the tokens"
    lines.append(f"  {np.count_nonzero(found.counts):,} different ids{part}; the most frequent:")
    for id, count in found.frequent(most):
        text = "" if tokenizer is None else f"  {tokenizer.decode([id])!r}"
        lines.append(f"  {id:>9}  {count:>13,}  {count / found.read_tokens:7.3%}{text}")
    return "\n".join(lines)


def shown(text: str) -> str:
    """The beginning of a text on one line."""
    short = text[:SHOWN_CHARACTERS]
    return short.replace("\n", "⏎") + ("…" if len(text) > len(short) else "")


def pairs_of(paths: Sequence[str]) -> list[str]:
    """Prefixes from prefixes, names of files of a pair, and folders, of which all pairs by name."""
    prefixes: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(str(index)[: -len(".idx")] for index in Path(path).glob("*.idx"))
            if not inside:
                raise DataError(f"{path}: has no .idx files; give a folder or prefixes of .bin/.idx pairs")
            prefixes += inside
        else:
            prefixes.append(path.removesuffix(".idx").removesuffix(".bin"))
    return prefixes
