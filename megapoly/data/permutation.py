"""Keyed permutations of range(size) in closed form: which slice of a source its k-th sample of an epoch is.

A generalised Feistel cipher over a near-square grid with cycle walking (Black and Rogaway 2002).
"""

import math

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

WORD = (1 << 64) - 1
FEISTEL_ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15


def mix(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection that scatters close 64-bit words."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def mix_all(words: Uint64s) -> Uint64s:
    """`mix` for an array; uint64 products wrap by themselves."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def grid(size: int) -> tuple[int, int]:
    """Rows and columns of the smallest near-square grid that holds `size` cells; fewer than a row stays empty."""
    rows = math.isqrt(size - 1) + 1
    return rows, -(-size // rows)


def permute(index: int, size: int, key: int) -> int:
    """Where the permutation of range(size) that `key` (64 bits) selects puts `index`."""
    rows, columns = grid(size)
    while True:
        row, column = divmod(index, columns)
        for step in range(0, 2 * FEISTEL_ROUNDS, 2):
            row = (row + mix((mix((key + step * GOLDEN) & WORD) + column) & WORD) % rows) % rows
            column = (column + mix((mix((key + (step + 1) * GOLDEN) & WORD) + row) & WORD) % columns) % columns
        index = row * columns + column
        if index < size:
            return index


def permute_all(index: Int64s, size: int, keys: Uint64s) -> Int64s:
    """`permute` for an array of indices with a key each."""
    rows, columns = (np.uint64(extent) for extent in grid(size))
    placed = index.astype(np.uint64)
    walking = np.arange(len(placed))
    while len(walking):
        key = keys[walking]
        row, column = np.divmod(placed[walking], columns)
        for step in range(0, 2 * FEISTEL_ROUNDS, 2):
            row = (row + mix_all(mix_all(key + np.uint64(step * GOLDEN & WORD)) + column) % rows) % rows
            column = (column + mix_all(mix_all(key + np.uint64((step + 1) * GOLDEN & WORD)) + row) % columns) % columns
        placed[walking] = row * columns + column
        walking = walking[placed[walking] >= size]
    return placed.astype(np.int64)
