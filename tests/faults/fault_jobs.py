"""Small real `torchrun` jobs for fault trials: how they start, what shows of them from outside, how they ended."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.run

from megapoly.checkpoint.folders import step_folders
from megapoly.data.corpus import prepare_corpus
from megapoly.data.realised import without_times

ROOT = Path(__file__).resolve().parents[2]
STEPS, INTERVAL, KEPT, RETAINED = 24, 4, 2, 12
FLAGS = (
    f"--num-layers 2 --hidden-size 64 --num-attention-heads 4 --train-iters {STEPS} --save-interval {INTERVAL} "
    f"--most-recent-k {KEPT} --save-retain-interval {RETAINED} --eval-iters 1 --no-tensorboard --log-interval 1 "
    "--distributed-timeout-minutes 0.25 --global-batch-size 4 --data-root ../data --run-dir run"
).split()
LAYOUTS = {"TP 2": (2, 2), "DP 2": (2, 1), "TP 2 x DP 2": (4, 2)}  # ranks, tensor-parallel size
BEGAN = re.compile(r"^(?:resuming run from run/checkpoints/step_\d+ at step (\d+)/|starting run anew)", re.M)
PASSED_OVER = re.compile(r"^warning: run/checkpoints/step_(\d+) is damaged and was skipped", re.M)
NOT_SAVED = re.compile(r"^warning: rank \d+: run/checkpoints/step_(\d+) is not saved: ", re.M)
JOB_SECONDS = 240.0


class TrialError(Exception):
    """A promise that was not kept."""


def _launch(folder: Path, log: Path, arguments: list[str]) -> None:
    """The agent's process: what the command `torchrun` runs, in a fork that has imported torch already."""
    os.setsid()
    os.chdir(folder)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    torch.distributed.run.main(arguments)


class Job:
    """One `torchrun` in the folder of a trial, which may restart its ranks once."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.run = folder / "run"
        self.log, self.checkpoints = folder / "log", self.run / "checkpoints"
        ranks, tp = LAYOUTS[layout]
        self.size = ranks
        flags = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1", "--monitor-interval=0.1"]
        worker = [str(Path(__file__).parent / "fault_worker.py"), f"--tensor-model-parallel-size={tp}", *FLAGS]
        sys.stdout.flush()
        self.agent = multiprocessing.get_context("fork").Process(
            target=_launch, args=(folder, self.log, [*flags, *worker])
        )
        self.agent.start()
        self._known: dict[int, int] = {}

    @property
    def is_over(self) -> bool:
        """Whether the agent is gone."""
        return not self.agent.is_alive()

    def ranks(self) -> dict[int, int]:
        """Process of each rank that there is now."""
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children")
        found = {}
        for process in map(int, children.read_text().split()) if children.exists() else ():
            try:
                words = dict(w.split(b"=", 1) for w in Path(f"/proc/{process}/environ").read_bytes().split(b"\0") if w)
            except OSError:
                continue
            if b"RANK" in words:
                found[int(words[b"RANK"])] = process
        self._known |= {process: rank for rank, process in found.items()}
        return found

    def last_step(self) -> int:
        """The newest step that metrics.jsonl tells of."""
        try:
            lines = (self.run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        except OSError:
            return 0
        whole = [line for line in lines if line.endswith(b"\n")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def finished(self) -> set[int]:
        """Steps that have a folder with a final name."""
        return {int(path.name[5:]) for path in step_folders(self.checkpoints)}

    def hidden(self) -> list[str]:
        """Names in checkpoints/ that are not final."""
        try:
            return sorted(name for name in os.listdir(self.checkpoints) if name.startswith(".step_"))
        except OSError:
            return []

    def wait(self, seconds: float = JOB_SECONDS) -> int:
        """Wait for the end of the agent and of all its ranks; returns the agent's exit status."""
        until = time.monotonic() + seconds
        while not self.is_over:
            self.ranks()
            self.agent.join(0.1)
            if time.monotonic() > until:
                self.end()
                raise TrialError(f"the job was still running {seconds:.0f} s later")
        until = time.monotonic() + 30
        while left := [process for process in self._known if _is_there(process)]:
            if time.monotonic() > until:
                self.end()
                raise TrialError(f"ranks {[self._known[p] for p in left]} outlived their launcher by 30 s")
            time.sleep(0.02)
        return self.agent.exitcode or 0

    def end(self) -> None:
        """Kill the agent and all ranks."""
        for process in [self.agent.pid, *self.ranks().values(), *self._known]:
            kill(process, signal.SIGKILL)
        self.agent.join()


def kill(process: int | None, number: int) -> None:
    """Send a signal to a process that may be gone."""
    try:
        if process is not None:
            os.kill(process, number)
    except ProcessLookupError:
        return


def _is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass(frozen=True)
class Ending:
    """What a run leaves behind that must not depend on what happened to it."""

    files: dict[str, str]  # of the last checkpoint: name -> SHA-256
    rows: list[dict[str, Any]]  # of metrics.jsonl, without times
    kept: list[int]  # steps that have a checkpoint

    @staticmethod
    def of(folder: Path) -> "Ending":
        """Read the run in the folder of a trial."""
        checkpoints = folder / "run/checkpoints"
        last = checkpoints / f"step_{STEPS:08d}"
        if not last.is_dir():
            raise TrialError("the run ended without its last checkpoint")
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(last.iterdir())}
        rows = []
        for line in (folder / "run/metrics.jsonl").read_text().splitlines():
            rows.append(without_times(json.loads(line)))
        return Ending(files, rows, sorted(int(path.name[5:]) for path in step_folders(checkpoints)))


class Bench:
    """A folder with the data of all trials and, by layout, the ending of the run that nothing happens to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        prepare_corpus([str(path) for path in sorted((ROOT / "examples/data").glob("*.jsonl"))], str(folder / "data"))
        self._undisturbed: dict[str, Ending] = {}

    def undisturbed(self, layout: str) -> Ending:
        """Of a run without faults, made when it is first asked for."""
        if layout not in self._undisturbed:
            folder = self.folder / f"undisturbed {layout}"
            folder.mkdir()
            job = Job(folder, layout)
            if job.wait():
                raise TrialError(f"the run without faults failed: {job.log.read_text()}")
            self._undisturbed[layout] = Ending.of(folder)
        return self._undisturbed[layout]
