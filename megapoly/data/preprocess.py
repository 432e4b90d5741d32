"""JSONL to token files: lines are read as a stream, encoded by worker processes and written in input order."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import zstandard

from megapoly.data.indexed import IndexedDatasetWriter, token_dtype
from megapoly.errors import DataError
from megapoly.tokenizer.load import Tokenizer, load_tokenizer

BATCH_LINES = 512
BATCH_BYTES = 1 << 20
BATCHES_IN_FLIGHT = 4  # per worker: bounds memory where reading outruns encoding
MAX_LINE_BYTES = 256 << 20
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


class BadLine(Exception):
    """A line that is no document; `kind` groups them in the report."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Summary:
    """What was written: documents and tokens of both sides, bytes of text, and bad lines by kind."""

    documents: int = 0
    held_out: int = 0
    empty: int = 0
    tokens: int = 0
    held_out_tokens: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    bad_lines: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        tokens = self.tokens + self.held_out_tokens
        ratio = self.text_bytes / tokens if tokens else 0.0
        parts = [
            f"{self.documents + self.held_out} documents ({self.held_out} held out, {self.empty} empty left out)",
            f"{tokens} tokens",
            f"{ratio:.2f} bytes per token",
            f"{self.text_bytes / 1e6 / max(self.seconds, 1e-9):.2f} MB/s",
            f"{sum(self.bad_lines.values())} bad lines",
        ]
        kinds = [f"{kind}: {count}" for kind, count in sorted(self.bad_lines.items())]
        return ", ".join(parts) + (f" ({', '.join(kinds)})" if kinds else "")


# ------------------------------------------------------------------------------------------------- reading lines


class _ZstdFile(io.RawIOBase):
    """Frames of Zstandard one after the other; unlike the library's own reader it notices a truncated last frame."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._pending = file, memoryview(b"")
        self._decoder: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            at_border = self._decoder is None or self._decoder.eof
            compressed = self._decoder.unused_data if self._decoder and at_border else b""
            # Small pieces: a few bytes of a frame may stand for megabytes of text.
            compressed = compressed or self._file.read(4096)
            if not compressed:
                if not at_border:
                    raise EOFError("the last frame has no end")
                return 0
            if at_border:
                self._decoder = zstandard.ZstdDecompressor().decompressobj()
            self._pending = memoryview(self._decoder.decompress(compressed))
        n = min(len(buffer), len(self._pending))
        buffer[:n], self._pending = self._pending[:n], self._pending[n:]
        return n


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a text file, `.gz` or `.zst`; blank lines are left out.

    Raises DataError for a file that is missing, damaged or truncated, and for a line over 256 MiB.
    """
    number = 0
    try:
        with ExitStack() as stack:
            file: Any = stack.enter_context(open(path, "rb"))
            if path.endswith(".gz"):
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif path.endswith(".zst"):
                file = stack.enter_context(io.BufferedReader(_ZstdFile(file), 1 << 16))
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, line {number}: is over {MAX_LINE_BYTES >> 20} MiB long; split it")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except _DAMAGE as error:
        raise DataError(f"{path}: damaged or truncated after line {number} ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check --input") from None


def parse_document(line: bytes, keys: Sequence[str]) -> dict[str, Any]:
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
            raise BadLine("missing key", f"key '{key}' is missing; the line has {sorted(document)[:8]}")
        if not isinstance(document[key], str):
            raise BadLine("wrong type", f"key '{key}' holds a {type(document[key]).__name__}, not a string")
        try:
            document[key].encode("utf-8")
        except UnicodeEncodeError:
            raise BadLine("invalid UTF-8", f"key '{key}' holds half of a surrogate pair, which is no text") from None
    return document


def read_documents(paths: Sequence[str], key: str = "text") -> Iterator[dict[str, Any]]:
    """All documents of JSONL files, one after the other; raises DataError that names file and line of a bad one."""
    for path in paths:
        for number, line in read_lines(path):
            try:
                yield parse_document(line, [key])
            except BadLine as bad:
                raise DataError(f"{path}, line {number}: {bad}") from None


def identity(document: dict[str, Any], key: str = "text") -> str:
    """What decides a document's side: its `id`, which translations share, else its text."""
    return str(document["id"]) if document.get("id") is not None else str(document[key])


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a document of this identity is held out: the same on every machine and in every run."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# ------------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know; small, as it is sent to each process once."""

    tokenizer_type: str
    tokenizer_model: str
    append_eod: bool
    json_keys: tuple[str, ...]
    valid_fraction: float
    skip_bad_lines: bool


@dataclass
class _Batch:
    """Encoded lines: for each key the ids back to back, the length of each document, and which are held out."""

    tokens: dict[str, npt.NDArray[np.integer]]
    lengths: dict[str, npt.NDArray[np.int64]]
    held_out: npt.NDArray[np.bool_]
    text_bytes: int
    bad_lines: Counter[str]
    error: str | None


Lines = tuple[str, list[tuple[int, bytes]]]
_worker: tuple[_Job, Tokenizer] | None = None


def _encode(job: _Job, tokenizer: Tokenizer, lines: Lines) -> _Batch:
    path, numbered = lines
    ids: dict[str, list[int]] = {key: [] for key in job.json_keys}
    lengths: dict[str, list[int]] = {key: [] for key in job.json_keys}
    held_out: list[bool] = []
    bad_lines: Counter[str] = Counter()
    text_bytes, error = 0, None
    for number, line in numbered:
        try:
            document = parse_document(line, job.json_keys)
        except BadLine as bad:
            bad_lines[bad.kind] += 1
            if not job.skip_bad_lines:
                error = f"{path}, line {number}: {bad}; or give --on-bad-line skip"
                break
            continue
        held_out.append(is_held_out(identity(document, job.json_keys[0]), job.valid_fraction))
        for key in job.json_keys:
            encoded = tokenizer.encode(document[key])
            if encoded and job.append_eod:
                encoded.append(tokenizer.eod)
            ids[key] += encoded
            lengths[key].append(len(encoded))
            text_bytes += len(document[key].encode())
    tokens = {key: np.array(value, dtype=token_dtype(tokenizer.vocab_size)) for key, value in ids.items()}
    sizes = {key: np.array(value, dtype=np.int64) for key, value in lengths.items()}
    return _Batch(tokens, sizes, np.array(held_out, dtype=bool), text_bytes, bad_lines, error)


def _start_worker(job: _Job) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C for all
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _worker = (job, load_tokenizer(job.tokenizer_type, job.tokenizer_model))


def _encode_in_worker(lines: Lines) -> _Batch:
    assert _worker is not None
    return _encode(*_worker, lines)


def _line_batches(inputs: Iterable[str]) -> Iterator[Lines]:
    for path in inputs:
        lines: list[tuple[int, bytes]] = []
        size = 0
        for number, line in read_lines(path):
            lines.append((number, line))
            size += len(line)
            if len(lines) >= BATCH_LINES or size >= BATCH_BYTES:
                yield path, lines
                lines, size = [], 0
        if lines:
            yield path, lines


def _encoded_batches(
    job: _Job, tokenizer: Tokenizer, inputs: Sequence[str], workers: int
) -> Generator[_Batch, None, None]:
    """Batches in the order of the input; at most BATCHES_IN_FLIGHT x workers of them exist at once."""
    if workers == 1:
        yield from (_encode(job, tokenizer, lines) for lines in _line_batches(inputs))
        return
    # spawn: a forked child would inherit the threads' locks of whoever calls this.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    pending: deque[Future[_Batch]] = deque()
    try:
        for lines in _line_batches(inputs):
            pending.append(pool.submit(_encode_in_worker, lines))
            if len(pending) >= BATCHES_IN_FLIGHT * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenExecutor:
        raise DataError("a worker process died, often for want of memory; give fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------------------------- the whole


class _Outputs:
    """The writers of one key: of training text and, where a fraction was asked for, of held-out text."""

    def __init__(self, stack: ExitStack, job: _Job, prefix: str, key: str, vocab_size: int) -> None:
        self.train = stack.enter_context(IndexedDatasetWriter(f"{prefix}_{key}_document", vocab_size))
        self.valid: IndexedDatasetWriter | None = None
        if job.valid_fraction:
            self.valid = stack.enter_context(IndexedDatasetWriter(f"{prefix}_valid_{key}_document", vocab_size))

    def add(self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64], held_out: npt.NDArray[Any]) -> None:
        if self.valid is None:
            self.train.add_documents(tokens, lengths)
            return
        mask = np.repeat(held_out, lengths)
        self.train.add_documents(tokens[~mask], lengths[~held_out])
        self.valid.add_documents(tokens[mask], lengths[held_out])

    def finalize(self) -> None:
        """An empty held-out side leaves no files, nor those of an earlier run, which would belong to other text."""
        self.train.finalize()
        if self.valid is not None and self.valid.num_documents:
            self.valid.finalize()
        elif self.valid is not None:
            Path(f"{self.valid.prefix}.idx").unlink(missing_ok=True)
            Path(f"{self.valid.prefix}.bin").unlink(missing_ok=True)


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer_type: str,
    tokenizer_model: str,
    *,
    append_eod: bool = False,
    workers: int = 1,
    json_keys: Sequence[str] = ("text",),
    on_bad_line: str = "error",
    valid_fraction: float = 0.0,
    log_interval: int = 10000,
    log: Callable[[str], None] = print,
) -> Summary:
    """Encode JSONL files into `{output_prefix}_{key}_document.bin/.idx`, byte for byte as Megatron-LM writes them.

    Documents keep the order of the input; empty ones are left out. With `valid_fraction` the documents whose hash of
    `id` (else of the text) falls below it go to `{output_prefix}_valid_{key}_document`. `log_interval` is in documents.
    Raises DataError, before any output has its name, for unreadable input, a bad line (`on_bad_line` "error"; "skip"
    counts them), no documents, a dead worker or a full disk.
    """
    if workers < 1:
        raise DataError(f"workers ({workers}) must be at least 1")
    if not 0 <= valid_fraction < 1:
        raise DataError(f"valid_fraction ({valid_fraction}) must lie in [0, 1)")
    if on_bad_line not in ("error", "skip"):
        raise DataError(f"on_bad_line '{on_bad_line}' is unknown; known: error, skip")
    _refuse_keys(json_keys, valid_fraction)
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    job = _Job(tokenizer_type, tokenizer_model, append_eod, tuple(json_keys), valid_fraction, on_bad_line == "skip")
    try:
        with ExitStack() as stack:
            outputs = {key: _Outputs(stack, job, output_prefix, key, tokenizer.vocab_size) for key in json_keys}
            # closing: on an error the worker processes end before this function does.
            batches = stack.enter_context(closing(_encoded_batches(job, tokenizer, inputs, workers)))
            summary = _write_all(job, batches, outputs, log_interval, log)
            if not summary.documents:
                raise _no_documents(inputs, summary)
            for output in outputs.values():
                output.finalize()
    except OSError as error:
        raise DataError(f"{output_prefix}: cannot be written: {error.strerror or error}") from None
    return summary


def _refuse_keys(keys: Sequence[str], valid_fraction: float) -> None:
    names = [*keys, *(f"valid_{key}" for key in keys if valid_fraction)]
    for key in names:
        if not key or "/" in key or key.startswith("."):
            raise DataError(f"json_keys: '{key}' is no plain name: it is a part of the names of the output files")
        if names.count(key) > 1:
            raise DataError(f"json_keys: two outputs would be PREFIX_{key}_document; give each key once")


def _no_documents(inputs: Sequence[str], s: Summary) -> DataError:
    counts = {"empty": s.empty, "held out": s.held_out, "bad lines": sum(s.bad_lines.values())}
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "no lines at all"
    return DataError(f"{', '.join(inputs)}: no documents to write ({found}); give files with text as --input")


def _write_all(
    job: _Job, batches: Iterator[_Batch], outputs: dict[str, _Outputs], log_interval: int, log: Callable[[str], None]
) -> Summary:
    summary, start, seen, first = Summary(), time.monotonic(), 0, job.json_keys[0]
    for batch in batches:
        summary.bad_lines += batch.bad_lines
        if batch.error is not None:
            raise DataError(batch.error)
        for key, output in outputs.items():
            output.add(batch.tokens[key], batch.lengths[key], batch.held_out)
        filled = batch.lengths[first] > 0
        summary.documents += int((filled & ~batch.held_out).sum())
        summary.held_out += int((filled & batch.held_out).sum())
        summary.empty += int((~filled).sum())
        summary.text_bytes += batch.text_bytes
        summary.seconds = time.monotonic() - start
        if log_interval and (seen + len(filled)) // log_interval > seen // log_interval:
            speed = summary.text_bytes / 1e6 / max(summary.seconds, 1e-9)
            log(f"{seen + len(filled)} documents, {speed:.2f} MB/s")
        seen += len(filled)
    summary.tokens = sum(output.train.num_tokens for output in outputs.values())
    summary.held_out_tokens = sum(output.valid.num_tokens for output in outputs.values() if output.valid)
    return summary
