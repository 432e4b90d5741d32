"""Text to token files: read as a stream, encoded by worker processes, written in order, resumable after a kill."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megapoly.data.documents import BadLine, documents_of, identity, is_held_out, no_documents, read_documents
from megapoly.data.encode import Batch, Job, encode_chunks
from megapoly.data.indexed import PACK_NOTE, IndexedDatasetWriter, publish, token_dtype
from megapoly.data.packed import PackNote, write_note
from megapoly.data.packing import Packing, pack_documents
from megapoly.data.progress import Progress
from megapoly.data.resume import Workspace, only_writer
from megapoly.data.shuffle import shuffle_documents
from megapoly.data.summary import Counts, Summary, merge_counts
from megapoly.data.templates import Template, fields_of
from megapoly.data.text_input import (
    MAX_EXPANSION,
    MAX_LINE_BYTES,
    Limits,
    Position,
    Wanted,
    describe_input,
    expand_inputs,
    read_chunks,
    read_lines,
)
from megapoly.errors import DataError
from megapoly.tokenizer.batch import choose_backend
from megapoly.tokenizer.load import HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = ["Summary", "identity", "is_held_out", "preprocess", "read_documents", "read_lines"]

CHECKPOINT_SECONDS = 15.0
LONGEST_ROW = 1 << 24  # as of seq_length
SAMPLE_FILES = 16
SAMPLE_CHARACTERS = 16_000  # of each file: by these a fast tokenizer is compared with the exact one


class _Outputs:
    """The writers of all keys: of training text and, where a fraction was asked for, of held-out text."""

    def __init__(self, stack: ExitStack, run: "_Run", vocab_size: int, state: dict[str, Any] | None) -> None:
        sizes = state["outputs"] if state else {}
        self.writers = {
            name: stack.enter_context(
                IndexedDatasetWriter(
                    run.output(name),
                    vocab_size,
                    str(run.workspace.folder / name),
                    tuple(sizes.get(name, (0, 0))),
                )
            )
            for name in run.names
        }

    def add(self, batch: Batch, valid_fraction: float) -> None:
        for key, tokens in batch.tokens.items():
            lengths = batch.lengths[key]
            if not valid_fraction:
                self.writers[key].add_documents(tokens, lengths)
                continue
            mask = np.repeat(batch.held_out, lengths)
            self.writers[key].add_documents(tokens[~mask], lengths[~batch.held_out])
            self.writers[f"valid_{key}"].add_documents(tokens[mask], lengths[batch.held_out])

    def sync(self) -> dict[str, tuple[int, int]]:
        return {name: writer.sync() for name, writer in self.writers.items()}


@dataclass
class _Run:
    """What stays the same from the start to the end of a run, and of those that go on with it."""

    prefix: str
    inputs: list[str]
    names: list[str]
    workspace: Workspace
    options: dict[str, Any]
    described: list[dict[str, Any]]
    valid_fraction: float
    shuffle_seed: int | None
    pack_length: int | None
    packed: list[str]  # names, of text to train on: held-out text is read whole and as it lies
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def output(self, name: str) -> str:
        """The prefix of the dataset of a key."""
        return f"{self.prefix}_{name}_document"

    def stem(self, name: str) -> str:
        """Where its files lie until they have their names."""
        stem = str(self.workspace.folder / name)
        if name in self.packed:
            return f"{stem}.packed"
        return stem if self.shuffle_seed is None else f"{stem}.shuffled"

    def state(self, phase: str, position: Position, outputs: Any, summary: Summary) -> dict[str, Any]:
        counted = {"languages": {name: asdict(c) for name, c in summary.languages.items()}}
        return {
            "options": self.options, "inputs": self.described, "phase": phase, "position": asdict(position),
            "outputs": outputs, "summary": counted | {"bad_lines": dict(summary.bad_lines)}, "packings": {},
        }  # fmt: skip


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer_type: str,
    tokenizer_model: str,
    *,
    append_eod: bool = False,
    include_special_tokens: bool = False,
    workers: int = 1,
    json_keys: Sequence[str] = ("text",),
    templates: Sequence[Template] = (),
    language_key: str = "lang",
    on_bad_line: str = "error",
    valid_fraction: float = 0.0,
    shuffle_seed: int | None = None,
    pack_length: int | None = None,
    tokenizer_backend: str = "auto",
    max_line_bytes: int = MAX_LINE_BYTES,
    max_expansion: float = MAX_EXPANSION,
    restart: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    log_interval: int = 10000,
    log: Callable[[str], None] = print,
    bar: bool = False,
) -> Summary:
    """Encode text into `{output_prefix}_{key}_document.bin/.idx`, byte for byte as Megatron-LM writes them.

    Inputs are JSONL (plain, .gz, .zst) and Parquet files and patterns. With `templates` the outputs are theirs, of
    lines with their fields. Documents keep the order of the input, or have that of `shuffle_seed`; empty ones are left
    out. With `valid_fraction` those whose hash of `id` (else of the text) falls below it go to
    `{output_prefix}_valid_{key}_document`; with `pack_length` the others are packed into rows (packing.py). What a
    killed run wrote up to its last checkpoint waits in `{output_prefix}.partial` and the same call goes on with it.
    `log_interval` is in documents. Raises DataError, before any output has its name, for unreadable input, a bad line
    (`on_bad_line` "error"; "skip" counts them), no documents, a dead worker, a full disk, a second writer, and inputs
    or options that have changed.
    """
    keys = fields_of(templates) if templates else tuple(json_keys)
    limits = Limits(max_line_bytes, max_expansion)
    wanted = Wanted(keys, language_key, on_bad_line == "skip", limits, tuple(templates))
    _check_options(workers, valid_fraction, on_bad_line, wanted)
    _check_packing(pack_length, append_eod)
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    frame = _frame(tokenizer, include_special_tokens, append_eod)
    run = _plan(inputs, output_prefix, tokenizer, wanted, frame, valid_fraction, (shuffle_seed, pack_length))
    run.checkpoint_seconds = checkpoint_seconds
    try:
        Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
        with only_writer([output_prefix, *map(run.output, run.names)]):  # all keys share the prefix's .partial
            state = run.workspace.begin(run.options, run.described, restart)
            try:
                backend, unlike, why = choose_backend(tokenizer_backend, tokenizer, _sample(run.inputs, wanted))
                job = Job(tokenizer_type, tokenizer_model, backend, unlike, *frame, valid_fraction, wanted)
                with Progress(sum(item["bytes"] for item in run.described), log_interval, log, bar) as progress:
                    progress.say(f"tokenizing by {backend}" + (f"; not by gigatoken: {why}" if why else ""))
                    return _carry_out(run, job, tokenizer, workers, state, progress)
            finally:
                if not run.workspace.is_resumable:
                    run.workspace.remove()
    except OSError as error:
        raise DataError(f"{output_prefix}: cannot be written: {error.strerror or error}") from None


def _plan(
    inputs: Sequence[str],
    prefix: str,
    tokenizer: Tokenizer,
    wanted: Wanted,
    frame: tuple[tuple[int, ...], tuple[int, ...]],
    valid_fraction: float,
    order: tuple[int | None, int | None],
) -> _Run:
    paths = expand_inputs(inputs)
    names = [*wanted.outputs, *(f"valid_{name}" for name in wanted.outputs if valid_fraction)]
    options = {
        "tokenizer_type": tokenizer.tokenizer_type, "tokenizer": _digest(tokenizer), "before": list(frame[0]),
        "after": list(frame[1]), "json_keys": list(wanted.keys), "language_key": wanted.language_key,
        "valid_fraction": valid_fraction, "shuffle_seed": order[0], "pack_length": order[1],
        "templates": [[template.name, *map(list, template.parts)] for template in wanted.templates],
    }  # fmt: skip
    described = [describe_input(path) for path in paths]
    packed = [] if order[1] is None else list(wanted.outputs)
    return _Run(prefix, paths, names, Workspace(prefix), options, described, valid_fraction, *order, packed)


def _carry_out(
    run: _Run, job: Job, tokenizer: Tokenizer, workers: int, state: dict[str, Any] | None, progress: Progress
) -> Summary:
    """Encode, shuffle, publish; each from where an earlier process ended."""
    summary = _summary(state)
    summary.backend = job.backend
    begin, phase, before = time.monotonic(), state["phase"] if state else "encode", summary.text_bytes
    for output in map(run.output, run.names):
        if Path(f"{output}.idx").exists():
            progress.say(f"{output}: is there already and will be replaced when all is done")
    if state:
        done = summary.all
        progress.say(f"going on behind {done.documents + done.held_out} documents of an interrupted run ({phase})")
    if phase == "encode":
        state = _encode_all(run, job, tokenizer, workers, state, summary, progress)
        phase = str(state["phase"])
    assert state is not None
    if phase == "shuffle":
        progress.say("shuffling the documents" if run.pack_length is None else "packing the documents")
        state = state | {"phase": "index", "packings": _put_in_order(run, token_dtype(tokenizer.vocab_size), state)}
        run.workspace.save(state)
    if state["phase"] == "index":
        for name in run.names:
            if name not in run.packed:
                _prepare(run, tokenizer, name, state["outputs"][name])
        state = state | {"phase": "publish"}
        run.workspace.save(state)
    for name in run.names:
        _publish(run, name, state["outputs"][name])
    run.workspace.remove()
    summary.packings = {run.output(name): Packing(**found) for name, found in state.get("packings", {}).items()}
    summary.seconds = time.monotonic() - begin
    summary.mb_per_second = (summary.text_bytes - before) / 1e6 / max(summary.seconds, 1e-9)
    return summary


def _encode_all(
    run: _Run,
    job: Job,
    tokenizer: Tokenizer,
    workers: int,
    state: dict[str, Any] | None,
    summary: Summary,
    progress: Progress,
) -> dict[str, Any]:
    start = Position(**state["position"]) if state else Position()
    with ExitStack() as stack:
        outputs = _Outputs(stack, run, tokenizer.vocab_size, state)
        chunks = read_chunks(run.inputs, job.wanted, start)
        # closing: on an error the worker processes end before this function does.
        batches = stack.enter_context(closing(encode_chunks(job, tokenizer, chunks, workers)))
        position, saved = start, time.monotonic()
        progress.begin(start.disk_bytes, summary.all.documents + summary.all.held_out)
        for batch in batches:
            if batch.error is not None:
                raise DataError(batch.error)
            outputs.add(batch, run.valid_fraction)
            summary.bad_lines += batch.bad_lines
            merge_counts(summary.languages, batch.languages)
            position = batch.end
            progress.advance(position.disk_bytes, batch.seen)
            if time.monotonic() - saved >= run.checkpoint_seconds:
                run.workspace.save(run.state("encode", position, outputs.sync(), summary))
                saved = time.monotonic()
        if not summary.documents:
            counts = {"empty": summary.empty, "held out": summary.held_out, "bad lines": summary.bad_lines.total()}
            raise no_documents(run.inputs, counts)
        phase = "index" if run.shuffle_seed is None and run.pack_length is None else "shuffle"
        state = run.state(phase, position, outputs.sync(), summary)
        run.workspace.save(state)
    return state


def _put_in_order(run: _Run, dtype: np.dtype, state: dict[str, Any]) -> dict[str, Any]:
    """Shuffle the documents of all keys, those to be packed as rows; what came of packing, by key."""
    packings: dict[str, Any] = {}
    for name in run.names:
        stem = str(run.workspace.folder / name)
        if run.pack_length is not None and name in run.packed and state["outputs"][name][0]:
            packing = pack_documents(stem, dtype, run.pack_length, run.shuffle_seed or 0)
            write_note(f"{run.stem(name)}.note", PackNote(packing.pack_length, packing.rows, packing.tokens))
            packings[name] = asdict(packing)
        elif run.shuffle_seed is not None:
            shuffle_documents(stem, dtype.itemsize, run.shuffle_seed)
    return packings


def _prepare(run: _Run, tokenizer: Tokenizer, name: str, size: tuple[int, int]) -> None:
    with IndexedDatasetWriter(run.output(name), tokenizer.vocab_size, run.stem(name), (size[0], size[1])) as writer:
        writer.prepare()


def _publish(run: _Run, name: str, size: tuple[int, int]) -> None:
    """An empty held-out side leaves no files, nor those of an earlier run, which would belong to other text."""
    prefix, stem = run.output(name), run.stem(name)
    if size[0]:
        publish(prefix, {kind: f"{stem}.{kind}" for kind in ("bin", "lengths", "idx", "note")})
    else:
        for kind in (".idx", ".bin", PACK_NOTE):
            Path(prefix + kind).unlink(missing_ok=True)


def _check_options(workers: int, valid_fraction: float, on_bad_line: str, wanted: Wanted) -> None:
    if workers < 1:
        raise DataError(f"workers ({workers}) must be at least 1")
    if not 0 <= valid_fraction < 1:
        raise DataError(f"valid_fraction ({valid_fraction}) must lie in [0, 1)")
    if on_bad_line not in ("error", "skip"):
        raise DataError(f"on_bad_line '{on_bad_line}' is unknown; known: error, skip")
    keys = wanted.outputs
    names = [*keys, *(f"valid_{key}" for key in keys if valid_fraction)]
    if not keys:
        raise DataError("json_keys: give at least one key")
    for key in names:
        if not key or "/" in key or "\0" in key or key.startswith("."):
            raise DataError(f"json_keys: '{key}' is no plain name: it is a part of the names of the output files")
        if names.count(key) > 1:
            raise DataError(f"json_keys: two outputs would be PREFIX_{key}_document; give each key once")


def _check_packing(pack_length: int | None, append_eod: bool) -> None:
    if pack_length is None:
        return
    if not 1 <= pack_length <= LONGEST_ROW:
        raise DataError(f"pack_length ({pack_length}) must lie between 1 and {LONGEST_ROW}: the tokens of a sample")
    if not append_eod:
        raise DataError(
            f"pack_length ({pack_length}) needs append_eod: nothing else tells the documents of a row apart; "
            "give --append-eod"
        )


def _summary(state: dict[str, Any] | None) -> Summary:
    if state is None:
        return Summary()
    found = state["summary"]
    languages = {name: Counts(**counts) for name, counts in found["languages"].items()}
    return Summary(languages, Counter(found["bad_lines"]))


def _frame(
    tokenizer: Tokenizer, include_special_tokens: bool, append_eod: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after each document."""
    before, after = list[int](), list[int]()
    if include_special_tokens and isinstance(tokenizer, HuggingFaceTokenizer):
        before, after = tokenizer.frame()
    return tuple(before), tuple([*after, tokenizer.eod] if append_eod else after)


def _digest(tokenizer: Tokenizer) -> str:
    path = Path(tokenizer.path)
    path = path / "tokenizer.json" if path.is_dir() else path
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample(paths: Sequence[str], wanted: Wanted) -> list[str]:
    """Text from the beginnings of files spread over all inputs."""
    texts: list[str] = []
    step = max(1, len(paths) // SAMPLE_FILES)
    for path in paths[::step][:SAMPLE_FILES]:
        left = SAMPLE_CHARACTERS
        for chunk in islice(read_chunks([path], wanted), 1):
            for _, document in documents_of(chunk, wanted):
                if left <= 0:
                    break
                if isinstance(document, BadLine):
                    continue
                texts += [text[:left] for text in document.texts]
                left -= sum(map(len, document.texts))
    return texts
