"""Mending text: newlines, invisible characters, form C, remnants of HTML, lines of no use; code stays as it is.

Each step leaves alone what is between backticks or in a fence. Steps are repeated until nothing changes, so that what
one uncovers another mends, and a second cleaning finds nothing.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from megapoly.data.clean.korean import has_emoticons, letters_of_lone_jamo, shorten_emoticons
from megapoly.data.clean.settings import Fixes

MOST_ROUNDS = 12
LONGEST_BOILERPLATE = 200
RIGHT_TO_LEFT = ("ar", "fa", "he", "ur", "yi")
_NEWLINES = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Controls, soft hyphen, zero-width spaces, byte order marks, private use, noncharacters. The joiners U+200C and U+200D
# stay: Persian, Indic scripts and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u180e\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\ue000-\uf8ff"
    "\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]+"
)
_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
_FENCE = re.compile(r"[ \t>]{0,40}(`{3,}|~{3,})")
_INLINE_CODE = re.compile(r"(`{1,2})[^`\n]+\1(?!`)")
_BLOCK = (
    "html head body title meta link main aside blockquote dl dt dd "
    "br p div li ul ol tr table tbody thead h1 h2 h3 h4 h5 h6 hr section article header footer nav center form"
)
_INLINE = "span font b i u s em strong small big sub sup a img td th label input button iframe figure figcaption tt"
_TAG = re.compile(rf"<(/?)({'|'.join((_BLOCK + ' ' + _INLINE).split())})((?:\s[^<>]{{0,2000}})?/?)>", re.IGNORECASE)
_BLOCK_TAGS = frozenset(_BLOCK.split())
# What needs no closing tag: by itself, where there are several, and in a page. `a<b>c` and `cp <input>` are no markup.
_BREAKS = frozenset("br hr".split())
_UNENDED = frozenset("p li tr td th dt dd thead tbody".split())
_OF_PAGES = frozenset("html head body link meta img input".split())
_DROPPED = (("<!--", "-->"), ("<!doctype", ">"), ("<script", "</script>"), ("<style", "</style>"))
_ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,8}\d{0,2});")
_URL_LINE = re.compile(r"\s*(?:https?://|www\.)\S+\s*")
_MANY_BLANK_LINES = re.compile("\n{2,}")


class Unsettled(Exception):
    """A text whose markup is nested so deeply that mending does not end."""


class TextFixer:
    """Mends texts by the given settings; counts what it did."""

    def __init__(self, settings: Fixes) -> None:
        self._settings = settings
        self._long_token = re.compile(f"[!-~]{{{settings.longest_token},}}") if settings.longest_token else None

    def __call__(self, text: str, language: str, done: Counter[str]) -> str:
        """The text as mended; `done` counts the changes by name. Raises Unsettled."""
        for _ in range(MOST_ROUNDS):
            before, text = text, self._once(text, language, done)
            if text == before:
                return text
        raise Unsettled

    def _once(self, text: str, language: str, done: Counter[str]) -> str:
        settings = self._settings
        text = _counted("newlines", _NEWLINES.subn("\n", text), done)
        if settings.invisible:
            text = _counted("invisible characters", _INVISIBLE.subn("", text), done)
            if language not in RIGHT_TO_LEFT:
                text = _counted("invisible characters", _DIRECTIONS.subn("", text), done)
        if settings.nfc and not unicodedata.is_normalized("NFC", text):
            text = _counted("form C", (unicodedata.normalize("NFC", text), 1), done)
        if settings.nfc:
            plain = letters_of_lone_jamo(text)
            text = _counted("lone jamo", (plain, int(plain != text)), done)
        if settings.html and ("<" in text or "&" in text):
            meant = _tags_meant(text)
            text = _outside_code(text, lambda part: _without_html(part, meant, done))
        most = settings.emoticon_repeats
        if most and has_emoticons(text, most):
            text = _outside_code(text, lambda part: _counted("emoticons", shorten_emoticons(part, most), done))
        return self._lines(text, done)

    def _lines(self, text: str, done: Counter[str]) -> str:
        """Spaces at the ends of lines, lines of no use, and blank lines; indentation stays."""
        settings, kept, fence = self._settings, [], ""
        has_urls = settings.url_lines and ("http" in text or "www." in text)
        has_long = self._long_token is not None and self._long_token.search(text) is not None
        for line in text.split("\n"):
            stripped = line.rstrip()
            fence, is_code = _after(stripped, fence)
            if not is_code and stripped:
                if has_urls and _URL_LINE.fullmatch(stripped):
                    done["lines that are one address"] += 1
                    continue
                if has_long and self._long_token and self._long_token.search(stripped):
                    done["lines with an endless word"] += 1
                    continue
                short = len(stripped) <= LONGEST_BOILERPLATE
                if short and any(phrase in stripped for phrase in settings.boilerplate):
                    done["boilerplate lines"] += 1
                    continue
            done["spaces at ends of lines"] += stripped != line
            kept.append(stripped)
        text = "\n".join(kept).strip("\n")
        most = "\n" * (settings.most_blank_lines + 1)
        shorter = _MANY_BLANK_LINES.sub(lambda match: min(match[0], most, key=len), text)
        return _counted("blank lines", (shorter, int(shorter != text)), done)


def fix_newlines(text: str) -> str:
    """All that is done to code: newlines of one kind, no U+FEFF (byte order mark) and no NUL."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").replace("\0", "")


def _counted(name: str, changed: tuple[str, int], done: Counter[str]) -> str:
    text, times = changed
    if times:
        done[name] += times
    return text


def _after(line: str, fence: str) -> tuple[str, bool]:
    """The fence that is open after a line, and whether the line is code or a fence itself."""
    match = _FENCE.match(line)
    if not fence:
        return (match[1], True) if match else ("", False)
    closes = match is not None and match[1].startswith(fence) and match.end() == len(line)
    return ("" if closes else fence), True


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change what is neither in a fence nor between backticks."""
    if "`" not in text and "~~~" not in text:
        return change(text)
    parts: list[str] = []
    prose: list[str] = []

    def flush() -> None:
        piece, last = "\n".join(prose), 0
        for match in _INLINE_CODE.finditer(piece):
            parts.extend((change(piece[last : match.start()]), match[0]))
            last = match.end()
        parts.append(change(piece[last:]))
        prose.clear()

    fence, lines = "", text.split("\n")
    for number, line in enumerate(lines):
        fence, is_code = _after(line.rstrip(), fence)
        end = "\n" if number + 1 < len(lines) else ""
        if is_code:
            if prose:
                flush()
                parts.append("\n")
            parts.append(line + end)
        else:
            prose.append(line)
    if prose:
        flush()
    return "".join(parts)


def _tags_meant(text: str) -> frozenset[str]:
    """Names of which every tag in a text is markup, the lone ones too."""
    tags: list[re.Match[str]] = []

    def look(part: str) -> str:
        tags.extend(_TAG.finditer(part))
        return part

    if _TAG.search(text):
        _outside_code(text, look)
    closed = {tag[2].lower() for tag in tags if tag[1]}
    is_page = any(map(_is_sure, tags)) or sum(tag[2].lower() in _UNENDED for tag in tags) > 1
    return frozenset(closed | (_UNENDED | _OF_PAGES if is_page else set()))


def _is_sure(tag: re.Match[str]) -> bool:
    """Whether it can be nothing but markup: it closes, breaks a line or has attributes."""
    return bool(tag[1]) or "=" in tag[3] or tag[3].endswith("/") or tag[2].lower() in _BREAKS


def _without_tags(text: str, meant: frozenset[str]) -> tuple[str, int]:
    times = 0

    def instead(tag: re.Match[str]) -> str:
        nonlocal times
        name = tag[2].lower()
        if name not in meant and not _is_sure(tag):
            return tag[0]
        times += 1
        return "\n" if name in _BLOCK_TAGS else " " if name in ("td", "th") else ""

    return _TAG.sub(instead, text), times


def _without_html(text: str, meant: frozenset[str], done: Counter[str]) -> str:
    if "<" in text:
        for begin, end in _DROPPED:
            text = _counted("HTML", _dropped(text, begin, end), done)
        text = _counted("HTML", _without_tags(text, meant), done)
    if "&" in text:
        changed = _ENTITY.sub(_character, text)
        text = _counted("HTML", (changed, int(changed != text)), done)
    return text


def _dropped(text: str, begin: str, end: str) -> tuple[str, int]:
    """Text without what stands from each `begin` to its `end`; one without an end stays."""
    lowered = text.lower() if begin in text.lower() and len(text.lower()) == len(text) else text
    kept, last, times = [], 0, 0
    while (at := lowered.find(begin, last)) >= 0 and (to := lowered.find(end, at)) >= 0:
        kept.append(text[last:at])
        last, times = to + len(end), times + 1
    return "".join([*kept, text[last:]]), times


def _character(match: re.Match[str]) -> str:
    """What an entity stands for; itself where that would be markup or is no character to print.

    Escaped markup is text about markup, and stays escaped: unescaping it would make tags of it.
    """
    found = html.unescape(match[0])
    if found == "&" and not re.match(r"#?\w+;", match.string[match.end() : match.end() + 12]):
        return found
    if len(found) == 1 and (found.isprintable() or found == "\u00a0") and found not in "<>&`~":
        return found
    return match[0]
