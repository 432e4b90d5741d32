"""The steps that datatrove runs: reading inputs, cleaning, writing what stays, and the files of each language."""

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megapoly.data.clean.cleaner import Cleaner, Outcome
from megapoly.data.clean.ledger import Ledger
from megapoly.data.clean.quality import Verdict
from megapoly.data.clean.settings import CODE, Settings
from megapoly.data.documents import BadLine, bad_line_error, documents_of, identity, language_code, parse_document
from megapoly.data.indexed import sync_directory
from megapoly.data.text_input import Chunk, Rows, Wanted, read_chunks, too_long

Fields = dict[str, Any]


class CleanDocuments(PipelineStep):
    """Reads a task's share of the inputs and forwards what the rules keep, mended."""

    type = "CLEAN"
    name = "read and clean"

    def __init__(self, inputs: Sequence[str], wanted: Wanted, settings: Settings, ledgers: Path) -> None:
        super().__init__()
        self.inputs, self.wanted, self.settings, self.ledgers = list(inputs), wanted, settings, ledgers

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents with text and language; raises DataError for a bad line unless those are passed over."""
        clean, ledger = Cleaner(self.settings), Ledger(self.settings.samples)
        for path, share, shares in dealt(self.inputs, rank, world_size):
            name = os.fsencode(path).decode("utf-8", "replace")  # a name of a file may be no text
            for number, chunk in enumerate(read_chunks([path], self.wanted)):
                if number % shares != share:
                    continue
                for line, found in _documents(chunk, self.wanted):
                    if isinstance(found, BadLine):
                        self._report(path, line, found, ledger)
                        continue
                    document = self._cleaned(found, clean, ledger)
                    if document is not None:
                        document.id = f"{name}:{line}"
                        yield document
        ledger.save(self.ledgers / f"{rank:05d}.json")

    def _report(self, path: str, line: int, bad: BadLine, ledger: Ledger) -> None:
        if not self.wanted.skip_bad_lines:
            raise bad_line_error(path, line, bad, "; or give --on-bad-line skip", self.wanted.limits)
        ledger.of(bad.language).bad_lines[bad.kind] += 1

    def _cleaned(self, fields: Fields, clean: Cleaner, ledger: Ledger) -> Document | None:
        text = fields[self.wanted.keys[0]]
        named = fields.get(self.wanted.language_key)
        outcome: Outcome = clean(text, CODE if named == CODE else language_code(named), str(fields.get("kind")))
        tally = ledger.of(outcome.language)
        tally.read.add(1, len(text.encode()))
        if outcome.verdict:
            ledger.remove(outcome.language, outcome.verdict, outcome.text, facts_of(fields))
            return None
        tally.mended.update(name for name, times in outcome.mended.items() if times)
        fields[self.wanted.keys[0]], fields[self.wanted.language_key] = outcome.text, outcome.language
        return Document(outcome.text, "", metadata={"lang": outcome.language, "fields": json.dumps(fields)})


def facts_of(fields: Fields) -> Fields:
    """What a sample says of where a document comes from."""
    return {key: str(fields[key])[:200] for key in ("id", "source") if fields.get(key) is not None}


def dealt(inputs: Sequence[str], rank: int, tasks: int) -> Iterator[tuple[str, int, int]]:
    """(file, share, shares) of a task: whole files, or every shares-th chunk of one where there are more tasks."""
    if tasks <= len(inputs):
        yield from ((path, 0, 1) for path in inputs[rank::tasks])
        return
    number = rank % len(inputs)
    yield inputs[number], rank // len(inputs), len(range(number, tasks, len(inputs)))


def _documents(chunk: Chunk, wanted: Wanted) -> Iterator[tuple[int, Fields | BadLine]]:
    """Every line as all of its fields; of Parquet text, id and language."""
    if isinstance(chunk.data, Rows):
        for number, found in documents_of(chunk, wanted):
            if isinstance(found, BadLine):
                yield number, found
            else:
                language = chunk.data.languages[number - chunk.first] if chunk.data.languages else None
                yield number, {wanted.keys[0]: found.texts[0], wanted.language_key: language, "id": found.name}
    elif chunk.data is None:
        yield chunk.first, BadLine("line too long", too_long(wanted.limits.line_bytes))
    else:
        for number, line in chunk.lines():
            yield number, _line(line, wanted)


def _line(line: bytes, wanted: Wanted) -> Fields | BadLine:
    if len(line) > wanted.limits.line_bytes:
        return BadLine("line too long", too_long(wanted.limits.line_bytes))
    try:
        fields = parse_document(line, wanted.keys, wanted.language_key)
        fields[wanted.keys[0]].encode()
        identity(fields, wanted.keys[0]).encode()
        return fields
    except BadLine as bad:
        return bad
    except UnicodeEncodeError:
        return BadLine("invalid UTF-8", f"key '{wanted.keys[0]}' or the id holds half of a surrogate pair")


class WriteDocuments(PipelineStep):
    """Writes a task's documents for the following stages: one file, which appears when it is whole."""

    type = "CLEAN"
    name = "write for deduplication"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write all of `data`; the file is there even where that is nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{rank:05d}.jsonl.zst"
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file, zstandard.ZstdCompressor(3).stream_writer(file) as packed:
            for document in data:
                record = {"text": document.text, "id": document.id, **document.metadata}
                packed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        os.replace(temporary, path)
        sync_directory(self.folder)


class RemovedAsDuplicates:
    """Counts the documents that deduplication drops; what it is called with by DropDuplicates."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, document: Document, reason: str) -> None:
        """Count one document and keep it as a sample perhaps."""
        facts = facts_of(json.loads(document.metadata["fields"]))
        self.ledger.remove(document.metadata["lang"], Verdict(reason, ""), document.text, facts)


class WriteLanguages(PipelineStep):
    """Writes what stays, one folder a language and in it one file a task; files appear when all of them are whole."""

    type = "CLEAN"
    name = "write by language"

    def __init__(self, folder: Path, ledger: Ledger, ledgers: Path) -> None:
        super().__init__()
        self.folder, self.ledger, self.ledgers = folder, ledger, ledgers

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write all of `data` with the fields that the input had."""
        paths: dict[str, Path] = {}
        with ExitStack() as stack:
            files: dict[str, gzip.GzipFile] = {}
            for document in data:
                language = document.metadata["lang"]
                if language not in files:
                    paths[language] = self.folder / language / f"{rank:05d}.jsonl.gz"
                    files[language] = _open(paths[language], stack)
                files[language].write(_encoded(document.metadata["fields"]))
                self.ledger.of(language).kept.add(1, len(document.text.encode()))
        for path in paths.values():
            os.replace(_unfinished(path), path)
            sync_directory(path.parent)
        self.ledger.save(self.ledgers / f"{rank:05d}.json")


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _open(path: Path, stack: ExitStack) -> gzip.GzipFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = stack.enter_context(open(_unfinished(path), "wb"))  # noqa: SIM115  closed by the stack
    # No name and no time in the file: the same text makes the same bytes.
    return stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))


def _encoded(fields: str) -> bytes:
    record = json.loads(fields)
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a field that is not the text
        return json.dumps(record).encode() + b"\n"


def merged(ledgers: Sequence[Path], most: int) -> Ledger:
    """The ledgers that the tasks have saved in these folders, as one."""
    ledger = Ledger(most)
    for folder in ledgers:
        for path in sorted(folder.glob("*.json")):
            ledger.merge(path)
    return ledger
