"""Which language a document is in: what it says of itself against what py3langid finds among the configured ones."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from megapoly.data.clean.quality import Verdict
from megapoly.data.clean.settings import LanguageChoice
from megapoly.data.clean.units import prose_of
from megapoly.data.corpus import TWO_LETTERS
from megapoly.data.documents import UNKNOWN_LANGUAGE
from megapoly.errors import ConfigError

PIECE = 300  # characters; one from the beginning and one from the middle tell as much as the whole
# Not words of a language: addresses, code, tokens that stand for personal data, markup.
_NO_WORDS = re.compile(r"`[^`\n]*`|https?://\S+|<[^<>\n]{0,200}>|[^\W\d_]*[\d_@/\\=][^\s]*|[#*|>~\d]+")


@cache
def _model(languages: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    try:
        model.set_languages(languages)
    except ValueError as error:
        raise ConfigError(f"languages.allowed: {error}; py3langid does not know it") from None
    return model


@dataclass(frozen=True)
class Found:
    """A document's language, and why it is removed where it is."""

    language: str
    verdict: Verdict | None = None


class LanguageFinder:
    """Decides on languages by the given settings; raises ConfigError where the model does not know one of them."""

    def __init__(self, choice: LanguageChoice) -> None:
        self._choice = choice
        self._allowed = tuple(choice.allowed)
        _model(self._allowed)

    def __call__(self, text: str, given: str) -> Found:
        """The language of a text that names `given` (und where it names none)."""
        primary = re.split("[-_]", given)[0]
        own = TWO_LETTERS.get(primary, primary)
        if own != UNKNOWN_LANGUAGE and own not in self._allowed:
            return Found(own, Verdict("language not wanted", f"'{own}' is not among languages.allowed"))
        letters = letters_of(text)
        if own != UNKNOWN_LANGUAGE and len(letters.encode()) < self._choice.shortest_bytes:
            return Found(own)
        language, probability = _model(self._allowed).classify(letters)
        if own == UNKNOWN_LANGUAGE:
            if probability >= self._choice.least and (letters or len(self._allowed) == 1):
                return Found(language)
            return Found(own, Verdict("language uncertain", f"{language} with {probability:.2f}"))
        if language == own or probability < self._choice.sure or self._choice.on_other == "keep":
            return Found(own)
        if self._choice.on_other == "relabel":
            return Found(language)
        return Found(own, Verdict("other language", f"{language} with {probability:.2f}"))


def letters_of(text: str) -> str:
    """What of a text tells its language: words of its beginning and its middle, without addresses, code, numbers."""
    prose = prose_of(text)
    if len(prose) > 4 * PIECE:
        middle = len(prose) // 2
        prose = prose[: 2 * PIECE] + "\n" + prose[middle : middle + 2 * PIECE]
    words = " ".join(_NO_WORDS.sub(" ", prose).split())
    return words if len(words) <= 2 * PIECE else words[:PIECE] + " " + words[-PIECE:]
