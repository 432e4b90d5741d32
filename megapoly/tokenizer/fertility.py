"""What text costs in tokens, language by language, for one tokenizer or beside others."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megapoly.pictures import save_png
from megapoly.tokenizer.load import Tokenizer

Documents = Callable[[], Iterable[tuple[str, str]]]  # (language, text), anew at each call
ALL = "all"


@dataclass
class Fertility:
    """UTF-8 bytes, characters, words between white space, and the tokens that they became."""

    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0

    def add(self, text: str, tokens: int) -> None:
        """Count a text."""
        self.bytes += len(text.encode(errors="replace"))
        self.characters += len(text)
        self.words += len(text.split())
        self.tokens += tokens

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def tokens_per_word(self) -> float:
        """Of little meaning in languages that put no space between words (Chinese, Japanese, Thai)."""
        return self.tokens / max(self.words, 1)

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / self.characters


def fertility(tokenizer: Tokenizer, documents: Documents) -> dict[str, Fertility]:
    """What each language costs, by its code, and all of them together; languages without a token are left out."""
    found: dict[str, Fertility] = {}
    for language, text in documents():
        tokens = len(tokenizer.encode(text))
        for name in (language, ALL):
            found.setdefault(name, Fertility()).add(text, tokens)
    return {name: found[name] for name in sorted(found, key=lambda name: (name == ALL, name)) if found[name].tokens}


def table(of_tokenizer: Mapping[str, Mapping[str, Fertility]]) -> str:
    """Lines of text: a language a line, for each tokenizer bytes a token, tokens a word and tokens a character."""
    width = 27
    shown = [name if len(name) <= width else f"…{name[1 - width :]}" for name in of_tokenizer]
    names = "".join(f"  {name:>{width}}" for name in shown)
    units = "".join(f"  {'bytes/token':>{width - 13}} /word  /char" for _ in of_tokenizer)
    lines = [f"{'language':<8}{names}", f"{'':<8}{units}"]
    for language in dict.fromkeys(language for found in of_tokenizer.values() for language in found):
        row = f"{language:<8}"
        for found in of_tokenizer.values():
            f = found.get(language)
            row += f"  {'-':>{width}}" if f is None else (
                f"  {f.bytes_per_token:>{width - 13}.2f} {f.tokens_per_word:5.2f} {f.tokens_per_character:6.3f}"
            )  # fmt: skip
        lines.append(row)
    return "\n".join(lines)


def write_png(of_tokenizer: Mapping[str, Mapping[str, Fertility]], path: str) -> None:
    """Bars of bytes a token and tokens a word by language; ConfigError where it cannot be written."""
    from matplotlib.figure import Figure

    languages = list(dict.fromkeys(language for found in of_tokenizer.values() for language in found))
    figure = Figure(figsize=(max(6.0, 0.45 * len(languages) + 2), 6.5), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(2, 1, sharex=True), ("bytes_per_token", "tokens_per_word"),
        ("UTF-8 bytes a token", "tokens a word (between white space)"), strict=True,
    ):  # fmt: skip
        bar = 0.8 / len(of_tokenizer)
        for i, (name, found) in enumerate(of_tokenizer.items()):
            places = [x - 0.4 + (i + 0.5) * bar for x, language in enumerate(languages) if language in found]
            axes.bar(places, [getattr(f, what) for f in found.values()], bar, label=name)
        axes.set_ylabel(title)
        axes.set_xticks(range(len(languages)), languages)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False)
    save_png(figure, path, 150)
