"""What a rule counts: words, or characters in a language without spaces; and the prose of a document with code."""

import re

_FENCED = re.compile(r"^[ \t>]{0,40}(?:```|~~~)", re.MULTILINE)
# A run of Latin letters or digits, or one character that is no space.
_CHARACTER_UNITS = re.compile(r"[A-Za-z0-9_]+|[^\sA-Za-z0-9_]")


def units_of(text: str, unit: str) -> list[str]:
    """Words between spaces, or single characters with Latin words whole."""
    return text.split() if unit == "word" else _CHARACTER_UNITS.findall(text)


def prose_of(text: str) -> str:
    """A text without its fenced code; as it is where nothing else would be left."""
    if _FENCED.search(text) is None:
        return text
    kept, fence = [], ""
    for line in text.split("\n"):
        bare = line.lstrip(" \t>")
        mark = bare[:3]
        if not fence and mark in ("```", "~~~"):
            fence = mark
        elif fence:
            fence = "" if mark == fence and not bare.strip(mark[0] + " \t") else fence
        else:
            kept.append(line)
    prose = "\n".join(kept)
    return prose if prose.strip() else text
