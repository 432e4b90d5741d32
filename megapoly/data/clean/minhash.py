"""MinHash signatures of texts in any script: words or characters, n-grams, and rensa's hashes in bands.

All texts of a batch are worked on as one array of code points, so that no Python runs for a word or a character.
"""

import functools
import os
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read by rensa once; a task has one core, the executor runs many
from rensa import RMinHash

Hashes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]

ALGORITHM = f"1, rensa {RMinHash.ALGORITHM_VERSION}, Unicode {unicodedata.unidata_version}"
BATCH = 1 << 16  # characters; the arrays of one batch stay in the processor's cache
SEPARATOR, IN_WORD, ALONE = 0, 1, 2  # what a character is: between tokens, a part of a word, a token by itself
CODE_POINTS = 0x34000  # tables end behind the last plane of ideographs; beyond lie tags and private use
UNSPACED = [  # scripts that put no space between words: a token is a character
    *[(0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF)],  # Thai .. Tai Tham
    *[(0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x302D), (0x3031, 0x312F), (0x3190, 0x4DBF)],  # kana, ideographs
    *[(0x4E00, 0x9FFF), (0xA000, 0xA4CF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)],  # ideographs, Yi, Burmese
    *[(0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x16FE0, 0x16FFF), (0x1AFF0, 0x1B16F), (0x20000, CODE_POINTS - 1)],
]
MULTIPLIER = 0xD1342543DE82EF95  # odd, so that it has an inverse modulo 2^64


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of BATCH characters; the last of a list may reach beyond."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def band_hashes(texts: list[str], ngram: int, bands: int, rows: int, seed: int) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    """Hashes [texts, bands] that two texts share in a band with the probability J^rows, J their Jaccard similarity.

    Compared are the sets of n-grams of tokens, without regard to case, width and punctuation; a shorter text is one
    shorter n-gram. The second array tells which texts have a token at all: the hashes of the others mean nothing.
    """
    hashes, counts = shingles(texts, ngram)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, bands * rows, seed)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(texts), bands, rows)
    # 64-bit odd factors: with fewer bits, rows that differ would meet in one sum.
    return mixed((signatures * odd_numbers(rows)).sum(axis=2, dtype=np.uint64)), counts > 0


def shingles(texts: list[str], ngram: int) -> tuple[Hashes, Counts]:
    """The hashes of every text's n-grams, back to back, and how many each text has: one at least if it has a token."""
    tokens, lengths = _tokens(texts)
    ends = np.repeat(np.cumsum(lengths), lengths)
    left = ends - np.arange(len(tokens))  # tokens from here to the end of the text
    hashes = np.zeros(len(tokens), dtype=np.uint64)
    for i, factor in enumerate(odd_numbers(ngram)[: len(tokens)]):
        hashes[: len(tokens) - i] += np.where(left[: len(tokens) - i] > i, tokens[i:] * factor, np.uint64(0))
    is_first = left == np.repeat(lengths, lengths)
    counts = np.where(lengths > 0, np.maximum(lengths - ngram + 1, 1), 0)
    return mixed(hashes[(left >= ngram) | is_first]), counts


def _tokens(texts: list[str]) -> tuple[Hashes, Counts]:
    """The hashes of every text's tokens, back to back, and their number in each text.

    A longer text is cut every BATCH characters: that bounds memory and changes one word in thousands.
    """
    pieces = [text[at : at + BATCH] for text in texts for at in range(0, max(len(text), 1), BATCH)]
    firsts = np.cumsum([0] + [max(-(-len(text) // BATCH), 1) for text in texts[:-1]])
    hashed = [_tokens_of_pieces(batch) for batch in batches(pieces)]
    counts = np.add.reduceat(np.concatenate([counts for _, counts in hashed]), firsts)
    return np.concatenate([hashes for hashes, _ in hashed]), counts


def _tokens_of_pieces(texts: list[str]) -> tuple[Hashes, Counts]:
    joined = " ".join([*texts, ""]).encode("utf-32-le", "surrogatepass")
    codes = np.minimum(np.frombuffer(joined, dtype="<u4"), CODE_POINTS - 1)
    kinds, values = (table[codes] for table in _tables())
    before = np.concatenate([[np.uint8(SEPARATOR)], kinds[:-1]])
    starts = np.flatnonzero((kinds == ALONE) | ((kinds == IN_WORD) & (before != IN_WORD)))
    ends = np.flatnonzero((before == ALONE) | ((before == IN_WORD) & (kinds != IN_WORD)))
    # A polynomial over the whole batch: the difference of two of its sums is a word's, shifted by where it stands.
    powers, inverses = _powers()
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(codes)], out=sums[1:])
    borders = np.cumsum([0] + [len(text) + 1 for text in texts])
    counts = np.diff(np.searchsorted(starts, borders))
    return mixed((sums[ends] - sums[starts]) * inverses[starts]), counts


def mixed(values: Hashes) -> Hashes:
    """A permutation of 64-bit numbers that spreads every bit over all (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def odd_numbers(n: int) -> Hashes:
    """n odd numbers of 64 bits, always the same."""
    return mixed(np.arange(1, n + 1, dtype=np.uint64)) | np.uint64(1)


@functools.cache
def _powers() -> tuple[Hashes, Hashes]:
    """The multiplier's powers and their inverses, from the power 0 on."""
    longest = 2 * BATCH + 2  # a batch without its last piece, that piece and the space behind it
    one = np.ones(1, dtype=np.uint64)
    factors = (MULTIPLIER, pow(MULTIPLIER, -1, 1 << 64))
    powers, inverses = (np.cumprod(np.append(one, np.full(longest, f, dtype=np.uint64))) for f in factors)
    return powers, inverses


@functools.cache
def _tables() -> tuple[npt.NDArray[np.uint8], Hashes]:
    """What each code point is, and a random number for it that capitals and wide forms share with their plain form."""
    kinds = np.zeros(CODE_POINTS, dtype=np.uint8)
    plain = np.arange(CODE_POINTS, dtype=np.uint64)
    for code in range(CODE_POINTS):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN":
            kinds[code] = IN_WORD
        folded = unicodedata.normalize("NFKC", character).casefold()
        if len(folded) == 1:
            plain[code] = ord(folded)
    for first, last in UNSPACED:
        script = kinds[first : last + 1]
        script[script == IN_WORD] = ALONE
    return kinds, mixed(plain + np.uint64(1))
