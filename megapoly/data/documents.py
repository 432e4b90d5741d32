"""Lines and rows as documents: what is one and what is not, by what name it is known, on which side it falls."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megapoly.data.text_input import (
    Chunk,
    Limits,
    Rows,
    Wanted,
    is_compressed,
    is_parquet,
    read_chunks,
    read_lines,
    too_long,
)
from megapoly.errors import DataError

UNKNOWN_LANGUAGE = "und"
CHECKED_BYTES = 1 << 30  # of a compressed file: about ten seconds
_CODE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8}){0,3}")


class BadLine(Exception):
    """A line that is no document; `kind` groups them in the report, `language` is what the line says of itself."""

    def __init__(self, kind: str, message: str, language: str = UNKNOWN_LANGUAGE) -> None:
        super().__init__(message)
        self.kind, self.language = kind, language


@dataclass
class Document:
    """Texts by key, the name that decides its side, and its language (`und` where the line has no code)."""

    texts: list[str]
    text_bytes: list[bytes]
    name: str
    language: str


def parse_document(line: bytes, keys: Sequence[str], language_key: str = "lang") -> dict[str, Any]:
    """One line of JSONL as an object whose `keys` hold text; raises BadLine."""
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine("invalid UTF-8", f"invalid UTF-8 at byte {error.start}; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadLine("malformed JSON", f"malformed JSON ({error}); each line must be one object") from None
    if not isinstance(document, dict):
        raise BadLine("wrong type", f"holds a JSON {type(document).__name__}, not an object")
    for key in keys:
        if key not in document:
            found = sorted(name[:40] for name in document)[:8]
            language = language_code(document.get(language_key))
            raise BadLine("missing key", f"key '{key}' is missing; the line has {found}", language)
        if not isinstance(document[key], str):
            kind, language = type(document[key]).__name__, language_code(document.get(language_key))
            raise BadLine("wrong type", f"key '{key}' holds a {kind}, not a string", language)
    return document


def read_documents(paths: Sequence[str], key: str = "text") -> Iterator[dict[str, Any]]:
    """All documents of JSONL files, one after the other, and of Parquet files text, `id` and, if known, `lang`.

    Raises DataError that names file and line of a bad one.
    """
    for path in paths:
        if is_parquet(path):
            yield from _read_parquet(path, key)
            continue
        for number, line in read_lines(path):
            try:
                document = parse_document(line, [key])
                _utf8(document[key], key, UNKNOWN_LANGUAGE)
                yield document
            except BadLine as bad:
                raise bad_line_error(path, number, bad) from None


def _read_parquet(path: str, key: str) -> Iterator[dict[str, Any]]:
    wanted = Wanted((key,))
    for chunk in read_chunks([path], wanted):
        for number, found in documents_of(chunk, wanted):
            if isinstance(found, BadLine):
                raise bad_line_error(path, number, found)
            language = {} if found.language == UNKNOWN_LANGUAGE else {wanted.language_key: found.language}
            yield {key: found.texts[0], "id": found.name} | language


def no_documents(inputs: Sequence[str], counts: Mapping[str, int]) -> DataError:
    """The error for inputs without a document; `counts` says what is there instead."""
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "no lines at all"
    shown = ", ".join(inputs[:3]) + (f" and {len(inputs) - 3} more" if len(inputs) > 3 else "")
    return DataError(f"{shown}: no documents to write ({found}); give files with text as --input")


def bad_line_error(path: str, number: int, bad: BadLine, advice: str = "", limits: Limits | None = None) -> DataError:
    """The error for a line that is no document; where its archive as a whole is damaged, that is why, and the error."""
    if is_compressed(path):
        if os.path.getsize(path) > CHECKED_BYTES:
            tool = "gzip" if path.endswith(".gz") else "zstd"
            return DataError(f"{path}, line {number}: {bad}{advice}; `{tool} -t` tells whether the file is damaged")
        try:
            for _ in read_chunks([path], Wanted(skip_bad_lines=True, limits=limits or Limits())):
                pass
        except DataError as damage:
            return damage
    return DataError(f"{path}, line {number}: {bad}{advice}")


def documents_of(chunk: Chunk, wanted: Wanted) -> Iterator[tuple[int, Document | BadLine]]:
    """(line or row number, document or why it is none) of a chunk."""
    limit = wanted.limits.line_bytes
    if chunk.data is None:
        yield chunk.first, BadLine("line too long", too_long(limit))
    elif isinstance(chunk.data, Rows):
        for i in range(len(chunk.data.values[wanted.keys[0]])):
            yield chunk.first + i, _guarded(_row, chunk.data, i, wanted)
    else:
        for number, line in chunk.lines():
            if len(line) > limit:
                yield number, BadLine("line too long", too_long(limit))
            else:
                yield number, _guarded(_line, line, wanted)


def identity(document: dict[str, Any], key: str = "text") -> str:
    """What decides a document's side: its `id`, which translations share, else its text."""
    return str(document["id"]) if document.get("id") is not None else str(document[key])


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a document of this identity is held out: the same on every machine and in every run."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def language_code(value: Any) -> str:
    """A language as the text gives it, in small letters; `und` for anything that is no code such as en or zh-Hant."""
    return value.lower() if isinstance(value, str) and _CODE.fullmatch(value) else UNKNOWN_LANGUAGE


def _guarded(read: Any, *arguments: Any) -> Document | BadLine:
    try:
        document: Document = read(*arguments)
        return document
    except BadLine as bad:
        return bad


def _line(line: bytes, wanted: Wanted) -> Document:
    found = parse_document(line, wanted.keys, wanted.language_key)
    language = language_code(found.get(wanted.language_key))
    texts = [found[key] for key in wanted.keys]
    encoded = [_utf8(text, key, language) for text, key in zip(texts, wanted.keys, strict=True)]
    return _document(texts, encoded, identity(found, wanted.keys[0]), language, wanted)


def _row(rows: Rows, i: int, wanted: Wanted) -> Document:
    language = language_code(rows.languages[i]) if rows.languages else UNKNOWN_LANGUAGE
    texts, encoded = [], []
    for key in wanted.keys:
        value = rows.values[key][i]
        if value is None:
            raise BadLine("wrong type", f"column '{key}' is null, not a string", language)
        if len(value) > wanted.limits.line_bytes:
            raise BadLine("line too long", too_long(wanted.limits.line_bytes), language)
        try:
            texts.append(value.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadLine("invalid UTF-8", f"column '{key}': invalid UTF-8 at byte {error.start}", language) from None
        encoded.append(value)
    name = rows.ids[i] if rows.ids else None
    name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    return _document(texts, encoded, texts[0] if name is None else str(name), language, wanted)


def _document(texts: list[str], encoded: list[bytes], name: str, language: str, wanted: Wanted) -> Document:
    if wanted.templates:
        values = dict(zip(wanted.keys, texts, strict=True))
        texts = [template.render(values) for template in wanted.templates]
        encoded = [text.encode() for text in texts]
    return Document(texts, encoded, name, language)


def _utf8(text: str, key: str, language: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        why = f"key '{key}' holds half of a surrogate pair, which is no text"
        raise BadLine("invalid UTF-8", why, language) from None
