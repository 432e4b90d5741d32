"""How long a job stands still after a rank is killed: a real `torchrun` job, a SIGKILL, and its next start, timed.

The time from the kill to the first step that every rank has finished again, by parts that follow one another; each ends
when the last rank has come so far:

detection       the killed rank's peers are gone too: seen by them, by torchrun, or both
launcher        torchrun has started all ranks anew, Python included
imports         torch and megapoly
plan and data   configuration, checkpoint's metadata, token files, data plan
process groups  all ranks have met
model           built, weights drawn
load            the checkpoint read, checked, in place
step            the first step

The steps since the checkpoint are made again after that: they are the model's other term.
"""

import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
ROOT = BENCH.parents[1]
STARTS = ["process", "imports", "plan and data", "process groups", "model", "load", "step"]
PARTS = ["detection", "launcher", *STARTS[1:]]
POLL = 0.005


class RestartError(Exception):
    """The job did not do what was measured."""


def flags(hidden: int, layers: int, ranks: int) -> list[str]:
    """Of a small model, data parallel, that saves every few steps."""
    return (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {max(1, hidden // 64)} --seq-length 64 "
        f"--global-batch-size {ranks} --save-interval 5 --most-recent-k 2 --eval-interval 0 --eval-iters 1 "
        "--no-tensorboard --data-root data --run-dir run"
    ).split()


def write_data(folder: Path) -> None:
    """The tokens of the preset `tiny`, from the corpus that ships with the examples."""
    from megapoly.data.corpus import prepare_corpus

    texts = sorted((ROOT / "examples/data").glob("*.jsonl"))
    prepare_corpus([str(path) for path in texts], str(folder / "data"), log=lambda *_: None)


class Job:
    """The agent and what its ranks have noted."""

    def __init__(self, folder: Path, ranks: int, restarts: int, training: list[str]) -> None:
        self.marks_file, self.log, self.ranks = folder / "marks", folder / "log", ranks
        self.marks_file.touch()
        launch = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        command = [sys.executable, "-m", "torch.distributed.run", *launch, str(BENCH / "restart_worker.py")]
        path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.agent = subprocess.Popen(
                [*command, str(self.marks_file), *training], cwd=folder, env=os.environ | path, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def marks(self, start: int) -> dict[str, dict[int, tuple[float, int]]]:
        """Of a start, by part and rank: when it was first over, and the process."""
        found: dict[str, dict[int, tuple[float, int]]] = {}
        for line in self.marks_file.read_text().splitlines(keepends=True):
            if line.endswith("\n") and line.split(" ", 1)[0] == str(start):
                _, rank, process, seconds, part = line.rstrip("\n").split(" ", 4)
                found.setdefault(part, {}).setdefault(int(rank), (float(seconds), int(process)))
        return found

    def await_step(self, start: int, limit: float = 300.0) -> dict[str, dict[int, tuple[float, int]]]:
        """The marks of a start once all its ranks have made a step."""
        until = time.monotonic() + limit
        while len((marks := self.marks(start)).get("step", {})) < self.ranks:
            if self.agent.poll() is not None or time.monotonic() > until:
                raise RestartError(f"start {start} made no step:\n{self.log.read_text()}")
            time.sleep(POLL)
        return marks

    def end(self) -> None:
        """Kill what is left: the ranks die with the agent."""
        if self.agent.poll() is None:
            os.killpg(self.agent.pid, signal.SIGKILL)
        self.agent.wait()


def is_there(process: int) -> bool:
    """Whether a process still runs."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_and_wait(job: Job, start: int, victim: int, checkpoints: Path) -> dict[str, float]:
    """Kill a rank of a start that has saved; seconds of the parts until the next start's first step."""
    before = job.await_step(start)
    until = time.monotonic() + 300
    known = {path.name for path in checkpoints.glob("step_*")}
    while not {path.name for path in checkpoints.glob("step_*")} - known:  # a checkpoint of this start
        if time.monotonic() > until:
            raise RestartError("nothing was saved")
        time.sleep(POLL)
    processes = {rank: process for rank, (_, process) in before["process"].items()}
    killed = time.monotonic()
    os.kill(processes[victim], signal.SIGKILL)
    while any(map(is_there, processes.values())):
        time.sleep(POLL)
    gone = time.monotonic()
    after = job.await_step(start + 1)
    times = [killed, gone, *(max(seconds for seconds, _ in after[part].values()) for part in STARTS)]
    # The launcher may start a rank while another is still on its way out.
    ends = list(itertools.accumulate(times, max))
    return {part: end - begin for part, begin, end in zip(PARTS, ends, ends[1:], strict=False)}


def measure(folder: Path, ranks: int, rounds: int, hidden: int, layers: int) -> dict[str, Any]:
    """Seconds by part, the median over restarts, of a job in an empty folder; and the bytes that a restart loaded.

    Raises RestartError.
    """
    write_data(folder)
    job = Job(folder, ranks, rounds, flags(hidden, layers, ranks))
    checkpoints = folder / "run/checkpoints"
    try:
        told = [kill_and_wait(job, start, start % ranks, checkpoints) for start in range(rounds)]
        newest = max(checkpoints.glob("step_*"))
        loaded = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    finally:
        job.end()
    parts = {part: statistics.median(one[part] for one in told) for part in PARTS}
    return {"ranks": ranks, "rounds": told, "parts": parts, "seconds": sum(parts.values()), "loaded": loaded}
