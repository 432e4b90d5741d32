"""Repetition within a document by Gopher's measures: lines, paragraphs, the most frequent n-gram, repeated n-grams."""

import re

import numpy as np

from megapoly.data.clean.settings import Rules
from megapoly.data.clean.units import units_of

_PARAGRAPHS = re.compile(r"\n\s*\n")
_LETTER = re.compile(r"[^\W\d_]")
# Keys of n-grams are polynomials modulo 2^64: two different ones of a document share a key about never.
_ODD = np.uint64(0x9E3779B97F4A7C15)


def repetition(text: str, rules: Rules) -> tuple[str, str] | None:
    """(rule, what was measured) of the first measure that is over its limit; None where none is.

    Lines without a letter (rules, brackets, rows of a table's frame) are no repetition.
    """
    lines = [line.strip() for line in text.split("\n") if _LETTER.search(line)]
    paragraphs = [part.strip() for part in _PARAGRAPHS.split(text) if _LETTER.search(part)]
    for name, parts, most, most_characters in (
        ("lines", lines, rules.max_duplicate_lines, rules.max_duplicate_line_characters),
        ("paragraphs", paragraphs, rules.max_duplicate_paragraphs, rules.max_duplicate_paragraph_characters),
    ):
        share, of_characters = _duplicates(parts)
        if most and share > most:
            return f"repeated {name}", f"share {share:.3g}, over {most:g}"
        if most_characters and of_characters > most_characters:
            return f"repeated {name}", f"share of characters {of_characters:.3g}, over {most_characters:g}"
    units = units_of(text, rules.unit)
    if len(units) < max(2, rules.repetition_from):
        return None
    return _ngrams(units, rules)


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """Which share of parts, and of their characters, has stood before."""
    seen: set[str] = set()
    times, characters = 0, 0
    for part in parts:
        if part in seen:
            times += 1
            characters += len(part)
        seen.add(part)
    return times / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def _ngrams(units: list[str], rules: Rules) -> tuple[str, str] | None:
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    ids = np.fromiter(map(numbers.__getitem__, units), np.uint64, len(units))
    lengths = np.fromiter(map(len, units), np.int64, len(units))
    ends = np.concatenate(([0], np.cumsum(lengths)))
    wanted = [(int(n), most, False) for n, most in rules.top_ngrams]
    wanted += [(int(n), most, True) for n, most in rules.duplicate_ngrams]
    keys, size = ids + _ODD, 1
    at = np.arange(len(units))  # an n-gram that stands once begins no longer one that stands twice
    for n, most, is_repeat in sorted(wanted):
        while size < min(n, len(units)):
            keys, size = keys[:-1] * _ODD + ids[size:], size + 1
        at = at[at < len(keys)]
        if size < n or not len(at):
            break
        at, group, is_first = _repeated(keys, at)
        if is_repeat:
            characters = _covered(at[~is_first], n, lengths)
        else:
            characters = int(np.bincount(group, ends[at + n] - ends[at]).max(initial=0))
        share = characters / int(ends[-1])
        if most and share > most:
            name, which = ("repeated n-grams", "repeated") if is_repeat else ("one n-gram", "one")
            return name, f"share of characters in {which} {n}-grams {share:.3g}, over {most:g}"
    return None


def _repeated(keys: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the places those whose key stands at several of them: places, number of the key, whether it is the first."""
    order = at[np.argsort(keys[at], kind="stable")]
    ordered = keys[order]
    is_new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    has_next = np.concatenate((~is_new[1:], [False]))
    several = ~is_new | has_next
    return order[several], np.cumsum(is_new[several]) - 1, is_new[several]


def _covered(starts: np.ndarray, n: int, lengths: np.ndarray) -> int:
    """Characters of the units that lie in one of the n-grams which begin at these places."""
    border = np.zeros(len(lengths) + 1, np.int64)
    np.add.at(border, starts, 1)
    np.add.at(border, starts + n, -1)
    return int(lengths[np.cumsum(border[:-1]) > 0].sum())
