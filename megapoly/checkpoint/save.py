"""Writing checkpoints while training goes on.

A step waits until its rank's state is copied to host memory, or with async_save off until all is written. A thread of
each rank then writes the copy as the rank's shard into a temporary folder and, when that is on the disk, a file that
says so. The thread of the main rank waits for these files of all ranks, puts them together and gives the folder its
name. What the threads share are files: they enter no collective. Ranks agree on how a save went where the main threads
all are at the same place, before the next save and at the end of the run, and never wait there within a collective
(`wait`). So no order of events can make ranks wait for each other, and a rank that dies leaves a temporary folder.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.checkpoint.folders import Retention, prune, publish, roots_of, step_name, sweep
from megapoly.checkpoint.shard import write_shard
from megapoly.checkpoint.state import Piece, pieces, training_state
from megapoly.checkpoint.storage import FORMAT, MOST_JSON, file_entry, sealed, tensor_record, write_durably
from megapoly.errors import CheckpointError, Echo, StuckError
from megapoly.optim.sharded import ShardedOptimizer
from megapoly.parallel.collectives import all_gather, all_reduce_
from megapoly.parallel.mesh import Mesh
from megapoly.sections import CheckpointConfig
from megapoly.tokenizer.load import Tokenizer

RUNNING, DONE, FAILED, ABANDONED = range(4)
INTERVAL = 0.05  # seconds between two looks at what others have done
VISIBLE_SECONDS = 120.0  # within which a file that one host wrote is seen by another
LINGER_SECONDS = 60.0  # how long an error waits for the save under way
REMINDER_SECONDS = 60.0  # between two lines about a save that the run waits for
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # a tokenizer.json


class HostCopy:
    """Host memory for all pieces of a rank, allocated once, pinned where they are on a GPU."""

    def __init__(self, source: list[Piece], device: torch.device) -> None:
        entries = sum(p.tensor.numel() for p in source)
        # Zeros: the memory is really there from the start, rather than from the first save on.
        self.memory = torch.zeros(entries, dtype=torch.float32, pin_memory=device.type == "cuda")
        self.source, self.device = source, device
        self.pieces: list[Piece] = []
        begin = 0
        for p in source:
            assert p.tensor.dtype == torch.float32, "master weights and moments are fp32"
            end = begin + p.tensor.numel()
            self.pieces.append(replace(p, tensor=self.memory[begin:end].view(p.tensor.shape)))
            begin = end

    @torch.no_grad()
    def take(self) -> list[Piece]:
        """Copy the pieces as they are now; returns the copies, which hold until the next call."""
        for theirs, mine in zip(self.source, self.pieces, strict=True):
            mine.tensor.copy_(theirs.tensor, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return self.pieces


@dataclass
class Job:
    """A save into one directory, as one rank sees it; the thread sets status and error, the main thread `others`."""

    temporary: Path
    step: int
    state: bytes
    status: int = RUNNING
    error: Exception | None = None
    others: int = RUNNING  # FAILED once any rank has, DONE once all but the main rank are
    began: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """The name that it will have."""
        return self.temporary.with_name(step_name(self.step))


class Saver:
    """Saves of a run, one at a time, into its directory of checkpoints and a second one where it is configured.

    `start` is the checkpoint that the run began with: all of it was read and found sound, so that pruning spares it.
    All methods are called by all ranks together.
    """

    def __init__(
        self, cfg: CheckpointConfig, optimizer: ShardedOptimizer, tokenizer: Tokenizer | None,
        start: Path | None = None, failures: int = 0,
    ) -> None:  # fmt: skip
        assert cfg.save is not None
        self.cfg, self.start = cfg, start
        self.mesh: Mesh = optimizer.buffers.mesh
        self.roots = roots_of(cfg)
        self.retention = Retention(cfg.most_recent_k, cfg.save_retain_interval, frozenset(cfg.save_steps))
        self.pieces = pieces(optimizer.buffers, training_state(optimizer), for_saving=True)
        self.copy = HostCopy(self.pieces, self.mesh.device) if cfg.async_save else None
        self._news: deque[str] = deque()
        self._tokenizer_files: dict[str, bytes] = {}
        if self.mesh.is_main:
            self._make_ready()
            self._tokenizer_files = _files_of(tokenizer)  # type: ignore[arg-type]  # hashable by identity
        self.token = _agreed_token(self.mesh)  # which all ranks have once the main one is ready
        self.failures = failures  # in a row, those of the job's savers before this one included
        self.stall = 0.0  # seconds that the last save kept the step
        self._saves = 0
        self._has_one = start is not None  # whether there is anything to start again from
        self._is_stuck = False  # what waits for the save under way has given it up
        self._jobs: list[Job] = []
        self._thread = threading.Thread()

    def _make_ready(self) -> None:
        for root in self.roots:
            try:
                root.mkdir(parents=True, exist_ok=True)
                for path in sweep(root):
                    self._news.append(f"swept {path}, which an earlier job left unfinished")
            except OSError as error:
                raise CheckpointError(f"{root}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._linger()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save the state of all ranks as step_XXXXXXXX; `state` is plain data for state.json.

        Waits for the save before this one. A save that fails is warned of; raises CheckpointError, on one rank, where
        it was the last of max_failed_saves in a row.
        """
        self.wait()
        begin = time.perf_counter()
        self._start(step, json.dumps(state, indent=1, ensure_ascii=False).encode())
        self.stall = time.perf_counter() - begin
        if self.copy is None:
            self.wait()
            self.stall = time.perf_counter() - begin

    def _start(self, step: int, state: bytes) -> None:
        mine = self.pieces if self.copy is None else self.copy.take()
        self._saves += 1
        name = f".{step_name(step)}.{self.token}{self._saves:04x}.tmp"
        self._jobs = [Job(root / name, step, state) for root in self.roots]
        self._thread = threading.Thread(target=self._write, args=(self._jobs, mine), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save under way, if any, has come to its end on all ranks, and hear how it went.

        Says once a minute who is late. Raises StuckError on that rank, Echo on the others, after max_save_minutes.
        """
        if not self._jobs:
            return
        limit, since, said = 60 * self.cfg.max_save_minutes or math.inf, time.monotonic(), 0.0
        while True:
            waited = time.monotonic() - since
            mine = torch.tensor([*(job.status for job in self._jobs), waited > limit], device=self.mesh.device)
            table = all_gather(mine, self.mesh.world).view(self.mesh.world.size, -1).cpu()
            status_RJ, is_too_long = table[:, :-1], bool(table[0, -1])  # the main rank's clock decides
            for job, status_R in zip(self._jobs, status_RJ.T, strict=True):
                job.others = FAILED if (status_R == FAILED).any() else DONE if (status_R[1:] == DONE).all() else RUNNING
            if (status_RJ != RUNNING).all():
                break
            if is_too_long or waited - said > REMINDER_SECONDS:
                said = waited
                self._remind(status_RJ, is_too_long)
            time.sleep(INTERVAL)
        self._thread.join()
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            if job.error is not None and not isinstance(job.error, (OSError, CheckpointError)):
                raise job.error  # no disk is to blame
        self._judge(jobs, status_RJ)

    def _remind(self, status_RJ: Tensor, is_too_long: bool) -> None:
        """Say which rank the others wait for, and where it writes; end the run where that is too long."""
        late = int((status_RJ == RUNNING).any(1).nonzero()[-1])  # the main one last: it waits for the others' parts
        self._is_stuck = is_too_long
        if self.mesh.world.rank != late:
            if is_too_long:
                raise Echo(f"rank {late} cannot write", StuckError.status)
            return
        job = next(job for job in self._jobs if job.status == RUNNING)
        text = f"{job.temporary} is being written for {time.monotonic() - job.began:.0f} s now"
        if is_too_long:
            raise StuckError(
                f"rank {late}: {text} and does not end (max_save_minutes {self.cfg.max_save_minutes:g}): does the disk "
                f"answer? {self._left.capitalize()}; start the same command again"
            )
        self._warn(f"{text}, and the run waits for it")

    def _judge(self, jobs: list[Job], status_RJ: Tensor) -> None:
        is_good_J = (status_RJ == DONE).all(0)
        if self.mesh.is_main:
            for job, is_good in zip(jobs, is_good_J.tolist(), strict=True):
                if not is_good:
                    shutil.rmtree(job.temporary, ignore_errors=True)
        self._has_one |= bool(is_good_J.any())
        self.failures = 0 if is_good_J.any() else self.failures + 1
        if self.failures < self.cfg.max_failed_saves:
            return
        speaker = int((status_RJ == FAILED).any(1).nonzero()[0])
        if self.mesh.world.rank != speaker:
            raise Echo(f"rank {speaker} could not save")
        failed = next(job for job in jobs if job.status == FAILED)
        raise CheckpointError(
            f"{self.failures} saves in a row failed, the last one with: {failed.folder}: {_reason(failed.error)}; "
            f"{self._left}: mend it and start the same command again, or raise --max-failed-saves"
        )

    def finish(self, step: int, state: dict[str, Any]) -> None:
        """Wait for the last save, which was of `step`, and try again where it failed."""
        self.wait()
        while self.failures and self._saves:
            self.save(step, state)
            self.wait()

    @property
    def _left(self) -> str:
        return "earlier checkpoints are whole" if self._has_one else "there is no earlier checkpoint"

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread.is_alive()

    def news(self) -> list[str]:
        """What was saved, deleted and swept since the last call, in words; on the main rank."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _linger(self) -> None:
        """Let the save under way become whole before an error ends this process, if it does so soon."""
        until = time.monotonic() + (0 if self._is_stuck else LINGER_SECONDS)
        for job in self._jobs:
            while job.status == RUNNING or (job.status == DONE and job.temporary.exists()):
                if time.monotonic() > until:
                    return
                time.sleep(INTERVAL)

    # In the thread

    def _write(self, jobs: list[Job], mine: list[Piece]) -> None:
        for job in jobs:
            begin = time.perf_counter()
            try:
                self._write_shard(job, mine)
                if self.mesh.is_main:
                    size = self._complete(job)
                    seconds = time.perf_counter() - begin
                    self._news.append(f"saved {job.folder} ({size / 1e9:.3g} GB, {seconds:.1f} s)")
                    self._prune(job)
            except _AbandonedError:
                job.status = ABANDONED
            except Exception as error:  # the main thread raises it, or goes on
                job.error, job.status = error, FAILED
                self._warn(f"{job.folder} is not saved: {_reason(error)}; the next save tries again")
            else:
                job.status = DONE

    def _write_shard(self, job: Job, mine: list[Piece]) -> None:
        job.temporary.parent.mkdir(exist_ok=True)  # not its parents: a disk that is gone is not made anew elsewhere
        job.temporary.mkdir(exist_ok=True)
        name = f"shard_{self.mesh.world.rank:05d}"
        part: dict[str, Any] = {"files": {}, "chunks": []}
        if mine:
            part = write_shard(job.temporary / f"{name}.safetensors", mine)
        write_durably(job.temporary / f"{name}.json", json.dumps(part).encode())

    def _complete(self, job: Job) -> int:
        """Put the parts of all ranks together and give the folder its name; returns its size."""
        write_durably(job.temporary / "state.json", job.state)
        for name, content in self._tokenizer_files.items():
            write_durably(job.temporary / name, content)
        small = sorted(path for path in job.temporary.iterdir() if not path.name.startswith("shard_"))
        files = {path.name: file_entry(path) for path in small}
        tensors: dict[str, dict[str, Any]] = {}
        parts = self._await_parts(job)
        for path in parts:
            part = json.loads(path.read_bytes())
            files |= part["files"]
            for name, dtype, shape, chunk in part["chunks"]:
                tensors.setdefault(name, {"dtype": dtype, "shape": shape, "chunks": []})["chunks"].append(chunk)
        for entry in tensors.values():
            tensor_record(entry)
        metadata = sealed({"format": FORMAT, "tensors": tensors, "files": files})
        for name, content in (("metadata.json", metadata), ("state.json", job.state)):
            if len(content) > MOST_JSON:
                raise CheckpointError(f"{job.temporary / name}: {len(content):,} bytes are more than {MOST_JSON:,}")
        write_durably(job.temporary / "metadata.json", metadata)
        for path in parts:
            path.unlink()
        publish(job.temporary, self.token)
        return len(metadata) + sum(size for size, *_ in files.values())

    def _await_parts(self, job: Job) -> list[Path]:
        names = [f"shard_{rank:05d}.json" for rank in range(self.mesh.world.size)]
        until = math.inf
        while missing := set(names) - set(os.listdir(job.temporary)):
            if job.others == FAILED:
                raise _AbandonedError
            if job.others == DONE:
                until = min(until, time.monotonic() + VISIBLE_SECONDS)
            if time.monotonic() > until:
                raise CheckpointError(
                    f"{job.temporary}: {min(missing)} is not seen {VISIBLE_SECONDS:.0f} s after its rank has written "
                    "it; all hosts need the same directory there"
                )
            time.sleep(INTERVAL)
        return [job.temporary / name for name in names]

    def _prune(self, job: Job) -> None:
        try:
            for gone in prune(job.temporary.parent, self.retention, self.start, self.token):
                self._news.append(f"deleted {gone}")
        except (OSError, CheckpointError) as error:
            self._warn(f"old checkpoints of {job.temporary.parent} cannot be deleted: {_reason(error)}")

    def _warn(self, text: str) -> None:
        line = f"warning: rank {self.mesh.world.rank}: {text}\n"
        with contextlib.suppress(OSError):  # a log that cannot be written costs no save
            print(line, end="", file=sys.stderr, flush=True)  # in one piece: other ranks write to the same place


class _AbandonedError(Exception):
    """Another rank failed, and this one waits for it in vain."""


def _reason(error: BaseException | None) -> str:
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return where + str(getattr(error, "strerror", None) or error)


def _agreed_token(mesh: Mesh) -> str:
    """Eight hexadecimal digits that the main rank drew: names of this job's temporary folders."""
    drawn = secrets.randbits(32) if mesh.is_main else 0
    return f"{int(all_reduce_(torch.tensor([drawn], device=mesh.device), mesh.world)):08x}"


@functools.cache  # also for the savers after a rollback: the files may be gone or replaced while a run goes on
def _files_of(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The tokenizer's own files, under their usual names."""
    if tokenizer is None:
        return {}
    path = Path(tokenizer.path)
    if tokenizer.tokenizer_type == "SentencePieceTokenizer":
        return {"tokenizer.model": _tokenizer_file(path)}
    home = path if path.is_dir() else path.parent
    whole = home / "tokenizer.json" if path.is_dir() else path
    extra = [name for name in BESIDE if (home / name).is_file()]
    return {"tokenizer.json": _tokenizer_file(whole)} | {name: _tokenizer_file(home / name) for name in extra}


def _tokenizer_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
