"""What a pass over a corpus counts, by language."""

from collections import Counter
from dataclasses import dataclass, field

from megapoly.data.documents import UNKNOWN_LANGUAGE
from megapoly.data.packing import Packing

MOST_LANGUAGES = 1000  # what a hostile file invents must not fill the memory


@dataclass
class Counts:
    """Documents of both sides with tokens, those without, tokens, bytes of text and bad lines of one language."""

    documents: int = 0
    held_out: int = 0
    empty: int = 0
    tokens: int = 0
    held_out_tokens: int = 0
    text_bytes: int = 0
    bad_lines: int = 0

    def add(self, other: "Counts") -> None:
        """Count another part of the same language."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def counts_of(languages: dict[str, Counts], language: str) -> Counts:
    """The counts of a language; past MOST_LANGUAGES a new one counts as undetermined."""
    known = language in languages or len(languages) < MOST_LANGUAGES
    return languages.setdefault(language if known else UNKNOWN_LANGUAGE, Counts())


def merge_counts(into: dict[str, Counts], languages: dict[str, Counts]) -> None:
    """Add the counts of a batch."""
    for language, counts in languages.items():
        counts_of(into, language).add(counts)


@dataclass
class Summary:
    """What was written, by language and in all, bad lines by kind, and what came of packing, by prefix.

    `seconds` and `mb_per_second` (of text) are those of the last process, where several had to take their turn.
    """

    languages: dict[str, Counts] = field(default_factory=dict)
    bad_lines: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    mb_per_second: float = 0.0
    backend: str = ""
    packings: dict[str, Packing] = field(default_factory=dict)

    @property
    def all(self) -> Counts:
        """The sum over the languages."""
        total = Counts()
        for counts in self.languages.values():
            total.add(counts)
        return total

    @property
    def documents(self) -> int:
        return self.all.documents

    @property
    def held_out(self) -> int:
        return self.all.held_out

    @property
    def empty(self) -> int:
        return self.all.empty

    @property
    def tokens(self) -> int:
        return self.all.tokens

    @property
    def held_out_tokens(self) -> int:
        return self.all.held_out_tokens

    @property
    def text_bytes(self) -> int:
        return self.all.text_bytes

    def __str__(self) -> str:
        total = self.all
        tokens = total.tokens + total.held_out_tokens
        parts = [
            f"{total.documents + total.held_out} documents ({total.held_out} held out, {total.empty} empty left out)",
            f"{tokens} tokens",
            f"{total.text_bytes / tokens if tokens else 0.0:.2f} bytes per token",
            *([f"{self.mb_per_second:.2f} MB/s"] if self.mb_per_second else []),  # none where all was encoded before
            f"{sum(self.bad_lines.values())} bad lines",
        ]
        kinds = [f"{kind}: {count}" for kind, count in sorted(self.bad_lines.items())]
        return ", ".join(parts) + (f" ({', '.join(kinds)})" if kinds else "")

    def table(self) -> list[str]:
        """Lines with documents, tokens, bytes per token and bad lines of each language; and of each packed set."""
        lines = [f"{'language':<12}{'documents':>12}{'held out':>10}{'tokens':>15}{'bytes/token':>13}{'bad lines':>11}"]
        for name, c in [*sorted(self.languages.items()), ("all", self.all)]:
            tokens = c.tokens + c.held_out_tokens
            ratio = c.text_bytes / tokens if tokens else 0.0
            lines.append(f"{name:<12}{c.documents:>12}{c.held_out:>10}{tokens:>15}{ratio:>13.2f}{c.bad_lines:>11}")
        return lines + [f"{prefix}: {packing}" for prefix, packing in self.packings.items()]
