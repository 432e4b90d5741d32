"""Chunks of text to tokens, by worker processes, in the order of the input and with a bounded number in flight."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megapoly.data.documents import BadLine, Document, bad_line_error, documents_of, is_held_out
from megapoly.data.indexed import token_dtype
from megapoly.data.resume import leave_to_parent
from megapoly.data.summary import Counts, counts_of
from megapoly.data.text_input import Chunk, Position, Wanted
from megapoly.errors import DataError, MegapolyError
from megapoly.tokenizer.batch import Encoder, make_encoder, spot_check
from megapoly.tokenizer.load import Tokenizer, load_tokenizer

CHUNKS_IN_FLIGHT = 3  # per worker: bounds memory where reading outruns encoding


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; small, as it is sent to each process once."""

    tokenizer_type: str
    tokenizer_model: str
    backend: str
    unlike: tuple[str, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    valid_fraction: float
    wanted: Wanted


@dataclass
class Batch:
    """An encoded chunk: for each key the ids back to back and the length of each document, and which are held out."""

    end: Position
    tokens: dict[str, npt.NDArray[np.integer]]
    lengths: dict[str, npt.NDArray[np.int64]]
    held_out: npt.NDArray[np.bool_]
    languages: dict[str, Counts]
    bad_lines: Counter[str]
    error: str | None = None
    seen: int = 0


def encode_chunk(job: Job, tokenizer: Tokenizer, encoder: Encoder, chunk: Chunk) -> Batch:
    """Documents of a chunk as tokens; `error` names the line on which it ended, where bad lines are not skipped."""
    documents, bad_lines, error, languages = [], Counter[str](), None, dict[str, Counts]()
    for number, found in documents_of(chunk, job.wanted):
        if isinstance(found, BadLine):
            bad_lines[found.kind] += 1
            counts_of(languages, found.language).bad_lines += 1
            if not job.wanted.skip_bad_lines:
                advice = "; or give --on-bad-line skip"
                error = str(bad_line_error(chunk.path, number, found, advice, job.wanted.limits))
                break
        else:
            documents.append(found)
    held_out = np.zeros(len(documents), dtype=bool)
    if job.valid_fraction:
        held_out[:] = [is_held_out(document.name, job.valid_fraction) for document in documents]
    tokens, lengths = {}, {}
    for k, key in enumerate(job.wanted.outputs):
        try:
            tokens[key], lengths[key] = _encode_key(job, tokenizer, encoder, documents, k)
        except MegapolyError as wrong:
            raise DataError(f"{chunk.path}, lines {chunk.first} to {chunk.end.lines}: {wrong}") from None
    _count(languages, documents, lengths, held_out, job.wanted.outputs)
    return Batch(chunk.end, tokens, lengths, held_out, languages, bad_lines, error, len(documents))


def _encode_key(
    job: Job, tokenizer: Tokenizer, encoder: Encoder, documents: list[Document], k: int
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
    texts = [document.texts[k] for document in documents]
    ids, lengths = encoder.encode(texts, [document.text_bytes[k] for document in documents])
    spot_check(encoder, tokenizer, texts, (ids, lengths))
    if len(ids) and (int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0):
        raise DataError(f"the tokenizer gave an id beyond its {tokenizer.vocab_size} entries; copy its files again")
    return frame_documents(ids.astype(token_dtype(tokenizer.vocab_size)), lengths, job.before, job.after)


def frame_documents(
    ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
    """Each document that has tokens with the ids `before` in front of it and `after` behind it."""
    extra = len(before) + len(after)
    if not extra:
        return ids, lengths
    filled = lengths[lengths > 0]
    framed = filled + extra
    starts = np.cumsum(framed) - framed
    out = np.empty(int(framed.sum()), dtype=ids.dtype)
    is_text = np.ones(len(out), dtype=bool)
    places = [(starts + i, id) for i, id in enumerate(before)]
    places += [(starts + framed - len(after) + i, id) for i, id in enumerate(after)]
    for where, id in places:
        out[where], is_text[where] = id, False
    out[is_text] = ids
    return out, np.where(lengths > 0, lengths + extra, 0)


def _count(
    languages: dict[str, Counts],
    documents: list[Document],
    lengths: dict[str, npt.NDArray[np.int64]],
    held_out: npt.NDArray[np.bool_],
    keys: tuple[str, ...],
) -> None:
    totals = sum((lengths[key] for key in keys), np.zeros(len(documents), np.int64)).tolist()
    first = lengths[keys[0]].tolist()
    for document, total, filled, out in zip(documents, totals, first, held_out.tolist(), strict=True):
        c = counts_of(languages, document.language)
        c.text_bytes += sum(map(len, document.text_bytes))
        if out:
            c.held_out += filled > 0
            c.held_out_tokens += total
        else:
            c.documents += filled > 0
            c.tokens += total
        c.empty += not filled


# ------------------------------------------------------------------------------------------------- processes

_worker: tuple[Job, Tokenizer, Encoder] | None = None


def _start_worker(job: Job, tokenizer: Tokenizer | None) -> None:
    global _worker
    leave_to_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C for all
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    tokenizer = tokenizer or load_tokenizer(job.tokenizer_type, job.tokenizer_model)
    _worker = (job, tokenizer, make_encoder(job.backend, tokenizer, job.unlike))


def _encode_in_worker(chunk: Chunk) -> Batch:
    assert _worker is not None
    return encode_chunk(*_worker, chunk)


def encode_chunks(
    job: Job, tokenizer: Tokenizer, chunks: Iterable[Chunk], workers: int
) -> Generator[Batch, None, None]:
    """Batches in the order of the input; at most CHUNKS_IN_FLIGHT x workers of them exist at once.

    Raises DataError where a worker process dies.
    """
    if workers == 1:
        encoder = make_encoder(job.backend, tokenizer, job.unlike)
        yield from (encode_chunk(job, tokenizer, encoder, chunk) for chunk in chunks)
        return
    # A forked worker has imports and tokenizer at once; it would also inherit the locks that other threads hold.
    is_alone = sys.platform == "linux" and threading.active_count() == 1
    context = multiprocessing.get_context("fork" if is_alone else "spawn")
    given = (job, tokenizer if is_alone else None)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=given)
    pending: deque[Future[Batch]] = deque()
    failure: DataError | None = None
    try:
        reading = iter(chunks)
        while True:
            try:
                chunk = next(reading, None)
            except DataError as error:  # what was read before it is written first, as with one process
                failure = error
                break
            if chunk is None:
                break
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) >= CHUNKS_IN_FLIGHT * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    except BrokenExecutor:
        raise DataError("a worker process died, often for want of memory; give fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
