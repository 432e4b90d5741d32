"""Korean: jamo that stand alone, and emoticons of repeated jamo, without touching syllables, digits or spaces.

EleutherAI/dps, which prepared Polyglot-Ko's data, collapses any repeated character: 10000 becomes 100, and a syllable
before an emoticon is lost. Here only letters that are no syllable (ㅋ, ㅠ) are ever shortened.
"""

import re
import unicodedata
from functools import cache

# Conjoining jamo of an old syllable, which no precomposed one holds, or one that stands alone.
_CONJOINING = re.compile(
    "([\u1100-\u115f\ua960-\ua97c]+[\u1160-\u11a7\ud7b0-\ud7c6]+[\u11a8-\u11ff\ud7cb-\ud7fb]*)|([\u1100-\u11ff])"
)
_POSITIONS = ("CHOSEONG", "JUNGSEONG", "JONGSEONG")


@cache
def _letter(jamo: str) -> str:
    """The letter of a keyboard for a conjoining jamo; itself where there is none."""
    name = unicodedata.name(jamo, "")
    for position in _POSITIONS:
        name = name.replace(position, "LETTER")
    try:
        return unicodedata.lookup(name)
    except KeyError:
        return jamo


def letters_of_lone_jamo(text: str) -> str:
    """Conjoining jamo (U+1100 to U+11FF) that make no syllable as the letters of a keyboard; old syllables stay.

    `text` is in form C, so that what makes a modern syllable is one character already.
    """
    return _CONJOINING.sub(lambda match: match[1] or _letter(match[2]), text)


@cache
def _repeated(most: int) -> re.Pattern[str]:
    return re.compile(f"([\u3131-\u3163])\\1{{{most},}}")


def has_emoticons(text: str, most: int) -> bool:
    """Whether there is anything for shorten_emoticons to do."""
    return _repeated(most).search(text) is not None


def shorten_emoticons(text: str, most: int) -> tuple[str, int]:
    """A letter of Hangul that stands more than `most` times in a row, `most` times; and how many runs there were.

    안녕ㅋㅋㅋㅋ becomes 안녕ㅋㅋ: only U+3131 to U+3163 count, never a syllable.
    """
    return _repeated(most).subn(lambda match: match[1] * most, text)
