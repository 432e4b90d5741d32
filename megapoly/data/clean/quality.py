"""Quality of a document by Gopher's rules and PolyLM's additions (arXiv 2112.11446, 2307.06018), by language.

A verdict names the rule that removes the document and says by how much; documents of code have no such rules.
"""

import re
from dataclasses import dataclass
from functools import cache

import regex

from megapoly.data.clean.repetition import repetition
from megapoly.data.clean.settings import Rules
from megapoly.data.clean.units import prose_of, units_of

_BULLET = re.compile(r"[ \t]*(?:[-*+•‣⁃▪◦●○■□▶►·・]|[0-9]{1,3}[.)])[ \t\u3000]")
_ELLIPSIS = ("...", "…", "。。。")
# Between words; an apostrophe is part of one.
_NO_PUNCTUATION = str.maketrans(
    dict.fromkeys('"“”«»„()[]{}<>.,;:!?¿¡…—–-*_#`|/\\、。，！？：；「」『』（）《》،؛؟', " ")
)
_LETTERS = regex.compile(r"[\p{L}\p{M}]+")
_LETTER = re.compile(r"[^\W\d_]")
_DIGITS = re.compile(r"\d+")
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Verdict:
    """Which rule removes a document, and the figure that did."""

    rule: str
    detail: str


def judge(text: str, rules: Rules) -> Verdict | None:
    """What speaks against a text; None where nothing does."""
    if len(text) < rules.min_characters:
        return Verdict("too short", f"{len(text)} characters, under {rules.min_characters}")
    if rules.max_characters and len(text) > rules.max_characters:
        return Verdict("too long", f"{len(text)} characters, over {rules.max_characters}")
    if rules.max_damaged and (damaged := text.count("\ufffd") / len(text)) > rules.max_damaged:
        return Verdict("damaged text", f"{damaged:.2%} replacement characters, over {rules.max_damaged:.2%}")
    prose = prose_of(text)
    return (
        _lines(text, rules)
        or _words(prose, rules)
        or _characters(prose, rules)
        or _spam(text, rules)
        or _stop_words(prose, rules)
        or _repeats(prose, rules)
    )


def _over(rule: str, what: str, value: float, most: float) -> Verdict | None:
    return Verdict(rule, f"{what} {value:.3g}, over {most:g}") if most and value > most else None


def _under(rule: str, what: str, value: float, least: float) -> Verdict | None:
    return Verdict(rule, f"{what} {value:.3g}, under {least:g}") if value < least else None


def _lines(text: str, rules: Rules) -> Verdict | None:
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    count = max(1, len(lines))
    bullets = sum(_BULLET.match(line) is not None for line in lines) / count
    dots = sum(line.endswith(_ELLIPSIS) for line in map(str.rstrip, lines)) / count
    is_list = _over("bullet lines", "share of lines with a bullet", bullets, rules.max_bullet_lines)
    cut_off = _over("ellipsis lines", "share of lines with an ellipsis", dots, rules.max_ellipsis_lines)
    return (is_list if count > 3 else None) or (cut_off if count > 1 else None)


def _words(prose: str, rules: Rules) -> Verdict | None:
    words = prose.split()
    count = max(1, len(words))
    symbols = prose.count("#") + prose.count("…") + prose.count("...")
    if rules.unit == "character":
        share = symbols / max(1, len(units_of(prose, rules.unit)))
        return _over("symbols", "symbols a character", share, rules.max_symbols_per_word)
    verdict = _over("symbols", "symbols a word", symbols / count, rules.max_symbols_per_word)
    if verdict:
        return verdict
    alphabetic = sum(word.isalpha() or _LETTER.search(word) is not None for word in words) / count
    bare = prose.translate(_NO_PUNCTUATION).split()
    mean = sum(map(len, bare)) / max(1, len(bare))
    return (
        _under("alphabetic words", "share of words with a letter", alphabetic, rules.min_alphabetic_words)
        or _over("word length", "mean length of words", mean, rules.max_mean_word)
        or _under("word length", "mean length of words", mean, rules.min_mean_word)
    )


@cache
def _script(names: tuple[str, ...]) -> "regex.Pattern[str]":
    return regex.compile("[" + "".join(rf"\p{{{name}}}" for name in names) + "]+")


def _count(pattern: "regex.Pattern[str] | re.Pattern[str]", text: str) -> int:
    return sum(map(len, pattern.findall(text)))


def _characters(prose: str, rules: Rules) -> Verdict | None:
    visible = max(1, len(prose) - _count(_SPACES, prose))
    verdict = _over("digits", "share of digits", _count(_DIGITS, prose) / visible, rules.max_digits)
    if verdict or not rules.scripts:
        return verdict
    share = _count(_script(tuple(rules.scripts)), prose) / max(1, _count(_LETTERS, prose))
    return _under("script", f"share of {'/'.join(rules.scripts)} among letters", share, rules.min_script)


def _spam(text: str, rules: Rules) -> Verdict | None:
    found = [phrase for phrase in rules.spam if phrase in text]
    times = sum(text.count(phrase) for phrase in found)
    return Verdict("spam", f"{times} times {', '.join(found)}") if rules.max_spam and times >= rules.max_spam else None


def _stop_words(prose: str, rules: Rules) -> Verdict | None:
    if not rules.stop_words:
        return None
    if rules.unit == "character":
        is_long = len(prose) >= rules.stop_words_from
        found = sum(word in prose for word in rules.stop_words)
    else:
        words = prose.lower().translate(_NO_PUNCTUATION).split()
        is_long = len(words) >= rules.stop_words_from
        found = len(set(rules.stop_words).intersection(words))
    return _under("stop words", "different stop words", found, rules.min_stop_words) if is_long else None


def _repeats(prose: str, rules: Rules) -> Verdict | None:
    found = repetition(prose, rules)
    return Verdict(*found) if found else None
