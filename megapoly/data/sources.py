"""Sources as the plan reads them: so many slices each, English, non-English or code."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megapoly.config import nearest
from megapoly.errors import ConfigError
from megapoly.sections import Source

KINDS = ("text", "parallel", "code")
ENGLISH, NON_ENGLISH, CODE = PARTS = ("English", "non-English", "code")


@dataclass(frozen=True)
class PlanSource:
    """A source as the plan reads it; `dropped_tokens` at its end fill no slice.

    The slices of a packed one are rows of documents; `padding_tokens` of them have no text to predict.
    """

    name: str
    language: str
    kind: str
    tokens: int
    slices: int
    dropped_tokens: int
    packed: bool = False
    padding_tokens: int = 0

    def fullness(self, length: int) -> Fraction:
        """Part of its samples of `length` tokens that is text, on average; 1 unless it is packed."""
        return 1 - Fraction(self.padding_tokens, self.slices * length) if self.padding_tokens else Fraction(1)


def part_of(source: Source | PlanSource) -> str:
    """The part of a stage that a source counts in; parallel text counts by its language, code apart."""
    return CODE if source.kind == "code" else ENGLISH if source.language == "en" else NON_ENGLISH


def language_of(source: Source | PlanSource) -> str:
    """The language that a source counts in; `code` for code."""
    return CODE if source.kind == "code" else source.language


def slices_of(tokens: int, length: int) -> int:
    """Slices of `length` tokens and one of overlap that a stream has."""
    return max(tokens - 1, 0) // length


def plan_sources(
    sources: Sequence[Source], tokens_by_source: Sequence[int], rows_by_source: Sequence[int], length: int
) -> tuple[PlanSource, ...]:
    """The sources with their slices; ConfigError for a name, language, kind or weight that cannot be meant."""
    found = []
    for source, tokens, rows in zip(sources, tokens_by_source, rows_by_source, strict=True):
        decimal(source.weight, f"source '{source.name}': weight")
        _refuse_language(source)
        if source.kind not in KINDS:
            raise ConfigError(
                f"source '{source.name}': kind '{source.kind}' is unknown; {nearest(source.kind, list(KINDS))}"
            )
        if source.packed:
            slices = rows if tokens > rows else 0  # a row of one token has nothing to predict
            padding = slices * length - (tokens - rows) if slices else 0
            found.append(PlanSource(source.name, source.language, source.kind, tokens, slices, 0, True, padding))
            continue
        slices = slices_of(tokens, length)
        dropped = tokens - (slices * length + 1) if slices else tokens
        found.append(PlanSource(source.name, source.language, source.kind, tokens, slices, dropped))
    return tuple(found)


def _refuse_language(source: Source) -> None:
    """`EN` or `eng` would silently count as non-English."""
    code = re.split("[-_]", source.language.lower())[0]
    code = "en" if code in ("eng", "english") else code
    if code != source.language or not re.fullmatch("[a-z]{2,3}", code):
        fix = f"write '{code}'" if re.fullmatch("[a-z]{2,3}", code) else "write a code such as 'en' or 'ko'"
        raise ConfigError(f"source '{source.name}': language '{source.language}' is no lower-case code; {fix}")


def decimal(value: float, where: str, most: float | None = None) -> Fraction:
    """The decimal as written, 0.1 is 1/10; ConfigError unless it is at least 0 and at most `most`."""
    if most is not None and not 0 <= value <= most:
        hint = f"; {value:g} per cent is written {value / 100:g}" if most == 1 and 2 <= value <= 100 else ""
        raise ConfigError(f"{where} ({value:.15g}) must lie between 0 and {most:g}{hint}")
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{where} ({value:.15g}) must be a number of at least 0")
    return Fraction(repr(value))
