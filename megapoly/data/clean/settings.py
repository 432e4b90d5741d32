"""What cleaning does: thresholds for all languages and by language, read from YAML over defaults that ship with it."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import regex

from megapoly.config import build, nearest
from megapoly.data.clean.dedup import DedupSettings
from megapoly.data.corpus import LANGUAGES, TWO_LETTERS
from megapoly.errors import ConfigError
from megapoly.yaml12 import parse_yaml

CODE = "code"
MOST_REPEATS = 1_000_000  # far below what a pattern can count to


SHARES = (
    "max_symbols_per_word", "max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words", "max_digits",
    "max_damaged", "min_script", "max_duplicate_lines", "max_duplicate_line_characters", "max_duplicate_paragraphs",
    "max_duplicate_paragraph_characters",
)  # fmt: skip
COUNTS = (
    "min_characters", "max_characters", "min_mean_word", "max_mean_word", "min_stop_words", "stop_words_from",
    "max_spam", "repetition_from",
)  # fmt: skip


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class LanguageChoice:
    """Which languages are kept and how a document's is found; probabilities are py3langid's among `allowed`.

    Texts under `shortest_bytes` of letters keep the language they name. What names another language than the text is
    in, with a probability of `sure`, is removed, relabelled or kept; without a name, `least` decides.
    """

    allowed: list[str] = field(default_factory=lambda: list(LANGUAGES))
    on_other: str = _choice("remove", "relabel", "keep")
    sure: float = 0.9
    least: float = 0.5
    shortest_bytes: int = 90


@dataclass(frozen=True)
class Fixes:
    """What is mended in a text that stays; nothing of it touches fenced or inline code, or documents of code."""

    nfc: bool = True
    invisible: bool = True
    html: bool = True
    url_lines: bool = True
    longest_token: int = 400
    emoticon_repeats: int = 2
    most_blank_lines: int = 2
    boilerplate: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rules:
    """Thresholds that remove a document; 0 of a `max_`, an empty list or a `min_` of 0 turns a rule off.

    Gopher's (arXiv 2112.11446, table A1) unless a comment says otherwise; shares are of characters, lines or words.
    """

    unit: str = _choice("word", "character")
    min_characters: int = 50  # Polyglot-Ko's data (EleutherAI/dps): 50 to 100,000
    max_characters: int = 1_000_000
    min_mean_word: float = 3.0
    max_mean_word: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.65  # Gopher: 0.8, which removes manuals with tables and commands
    max_digits: float = 0.2  # PolyLM names digits and dates without a threshold
    max_damaged: float = 0.002  # U+FFFD
    stop_words: list[str] = field(default_factory=list)
    min_stop_words: int = 2
    stop_words_from: int = 40  # words; a shorter text may lack them
    scripts: list[str] = field(default_factory=list)
    min_script: float = 0.25  # of letters; Korean in EleutherAI/dps
    spam: list[str] = field(default_factory=list)
    max_spam: int = 3
    repetition_from: int = 80  # units; a shorter text repeats itself by chance
    max_duplicate_lines: float = 0.3
    max_duplicate_line_characters: float = 0.2
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_characters: float = 0.2
    top_ngrams: list[list[float]] = field(default_factory=lambda: [[2, 0.20], [3, 0.18], [4, 0.16]])
    duplicate_ngrams: list[list[float]] = field(
        default_factory=lambda: [[5, 0.15], [6, 0.14], [7, 0.13], [8, 0.12], [9, 0.11], [10, 0.10]]
    )


@dataclass(frozen=True)
class Tokens:
    """What stands in for personal data; null leaves that kind as it is. Names as in Polyglot-Ko's vocabulary."""

    email: str | None = "<|email|>"
    phone: str | None = "<|tel|>"
    resident_number: str | None = "<|rrn|>"
    card: str | None = "<|crd|>"
    account: str | None = "<|acc|>"
    ip: str | None = "<|ip|>"


@dataclass(frozen=True)
class KenlmModel:
    """A KenLM file of one language; documents above `most_perplexity` a word are removed."""

    model: str
    most_perplexity: float


@dataclass(frozen=True)
class FasttextModel:
    """A fastText classifier of one language; documents whose `label` has less than `least` are removed."""

    model: str
    label: str = "__label__good"
    least: float = 0.5


@dataclass(frozen=True)
class Settings:
    """All of cleaning; `by_language` holds what of `rules` differs in a language."""

    languages: LanguageChoice = field(default_factory=LanguageChoice)
    fixes: Fixes = field(default_factory=Fixes)
    rules: Rules = field(default_factory=Rules)
    by_language: dict[str, Rules] = field(default_factory=dict)
    personal_data: Tokens = field(default_factory=Tokens)
    kenlm: dict[str, KenlmModel] = field(default_factory=dict)
    fasttext: dict[str, FasttextModel] = field(default_factory=dict)
    dedup: DedupSettings | None = field(default_factory=DedupSettings)
    samples: int = 20

    def rules_of(self, language: str) -> Rules:
        """The rules of a language."""
        return self.by_language.get(language, self.rules)


def load_settings(path: str | None = None) -> Settings:
    """Settings of a YAML file over the defaults; without a file, the defaults.

    A file's `rules` hold in every language, over the defaults of each; its `by_language` over its `rules`. Raises
    ConfigError for unknown keys, with the nearest known one, and for values that cannot be.
    """
    shipped = _tree(resources.files("megapoly.data.clean").joinpath("languages.yaml").read_text("utf-8"), "defaults")
    given: dict[str, Any] = {}
    where = path or "defaults"
    if path is not None:
        try:
            given = _tree(Path(path).read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8"
            raise ConfigError(f"{path}: cannot be read: {reason}; check --config") from None
    settings: Settings = build(Settings, given, where)  # errors name the user's file
    common, special = given.get("rules") or {}, given.get("by_language") or {}
    rules = {
        language: build(Rules, {**shipped.get(language, {}), **common, **(special.get(language) or {})}, where)
        for language in sorted({*shipped, *special, *settings.languages.allowed})
    }
    allowed = [TWO_LETTERS.get(code, code) for code in settings.languages.allowed]
    settings = dataclasses.replace(
        settings, by_language=rules, languages=dataclasses.replace(settings.languages, allowed=allowed)
    )
    _check(settings, where)
    return settings


def _tree(text: str, origin: str) -> dict[str, Any]:
    tree = parse_yaml(text, origin)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: the top level must hold keys ({', '.join(Settings.__dataclass_fields__)})")
    return tree


def _refuse_outside(value: float, most: float, what: str) -> None:
    if not 0 <= value <= most:
        limits = "must not be negative" if most == math.inf else "must lie between 0 and 1 (30 per cent is 0.3)"
        raise ConfigError(f"{what} is {value:g}; it {limits}")


def _refuse_unknown_script(name: str, what: str) -> None:
    try:
        regex.compile(rf"[\p{{{name}}}]")
    except regex.error:
        raise ConfigError(f"{what}: '{name}' is no script of Unicode, such as Latin, Hangul or Han") from None


def _check(settings: Settings, where: str) -> None:
    allowed = settings.languages.allowed
    if not allowed:
        raise ConfigError(f"{where}: languages.allowed is empty; name at least one, such as en")
    for name, models in (("by_language", settings.by_language), ("kenlm", settings.kenlm),
                         ("fasttext", settings.fasttext)):  # fmt: skip
        for language in models:
            if language not in allowed and language not in LANGUAGES:
                raise ConfigError(f"{where}: {name}.{language} is no language of languages.allowed; "
                                  f"{nearest(language, allowed)}")  # fmt: skip
    for key in ("sure", "least"):
        _refuse_outside(getattr(settings.languages, key), 1, f"{where}: languages.{key}")
    for language, rules in settings.by_language.items():
        for name in SHARES:
            _refuse_outside(getattr(rules, name), 1, f"{where}: {name} of {language}")
        for name in COUNTS:
            _refuse_outside(getattr(rules, name), math.inf, f"{where}: {name} of {language}")
        if 0 < rules.max_characters < rules.min_characters:
            raise ConfigError(f"{where}: max_characters ({rules.max_characters}) of {language} is below its "
                              f"min_characters ({rules.min_characters}): nothing would stay")  # fmt: skip
        for name in rules.scripts:
            _refuse_unknown_script(name, f"{where}: scripts of {language}")
        for key in ("top_ngrams", "duplicate_ngrams"):
            for pair in getattr(rules, key):
                if len(pair) != 2 or pair[0] < 2 or pair[0] != int(pair[0]):
                    raise ConfigError(f"{where}: {key} of {language} must hold pairs [n, share], not {pair}")
                _refuse_outside(pair[1], 1, f"{where}: the share of {pair} in {key} of {language}")
    for kind, token in dataclasses.asdict(settings.personal_data).items():
        if token is not None and re.search("[0-9@]", token):
            raise ConfigError(f"{where}: personal_data.{kind} '{token}' holds a digit or @ and would be found itself")
    for name in ("longest_token", "emoticon_repeats", "most_blank_lines"):
        if not 0 <= getattr(settings.fixes, name) <= MOST_REPEATS:
            raise ConfigError(f"{where}: fixes.{name} must lie between 0 and {MOST_REPEATS}")
    if settings.samples < 0:
        raise ConfigError(f"{where}: samples must not be negative")
