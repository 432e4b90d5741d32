"""One trial: a job, a fault, whatever starts are needed to its end, and what must be true then."""

import contextlib
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fault_jobs import (
    BEGAN,
    INTERVAL,
    KEPT,
    LAYOUTS,
    NOT_SAVED,
    PASSED_OVER,
    RETAINED,
    Bench,
    Ending,
    Job,
    TrialError,
)
from fault_kinds import KINDS, Fault, MissedError, a_disk

from megapoly.checkpoint.folders import Retention
from megapoly.checkpoint.report import verify

POLICY = Retention(KEPT, RETAINED)
STARTS = 3


@dataclass
class Outcome:
    """What a trial did and showed; `problem` is empty where all promises were kept."""

    seed: int
    kind: str
    layout: str
    moment: str = ""
    restarts: int = 0  # how often ranks said again from where they begin, started by the agent or anew
    starts: int = 0  # new starts of the command
    lost: int = 0  # steps that had been made and were made again
    damaged: int = 0  # checkpoints
    detected: int = 0  # of these
    problem: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_trial(bench: Bench, seed: int, kind: str | None = None, logs: Path | None = None) -> Outcome:
    """The trial of a seed; its folder stays where a promise was not kept."""
    rng = random.Random(seed)
    kinds = sorted(KINDS)
    outcome = Outcome(seed, kind or kinds[seed % len(kinds)], rng.choice([*LAYOUTS][:2] * 2 + [*LAYOUTS][2:]))
    undisturbed = bench.undisturbed(outcome.layout)
    folder = bench.folder / f"trial-{seed}"
    folder.mkdir()
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        if outcome.kind == "fill the disk":
            stack.enter_context(a_disk(folder, rng))
        job = Job(folder, outcome.layout)
        try:
            fault = KINDS[outcome.kind](job, rng)
            outcome.moment, outcome.damaged = fault.moment, len(fault.damaged)
            job = _start_until_done(job, fault, outcome)
            _check(job, fault, outcome, Ending.of(folder), undisturbed)
        except MissedError:
            outcome.moment = "missed"
        except TrialError as error:
            outcome.problem = str(error)
        finally:
            job.end()
    outcome.seconds = round(time.monotonic() - begin, 1)
    if logs is not None:
        shutil.copy(folder / "log", logs / f"{seed}.log")
    if outcome.problem:
        outcome.problem += f"; see {folder / 'log'}"
    else:
        shutil.rmtree(folder)
    return outcome


def _start_until_done(job: Job, fault: Fault, outcome: Outcome) -> Job:
    """Wait for the end; new starts where a job ends without having finished the run."""
    while job.wait():
        outcome.starts += 1
        if outcome.starts == STARTS:
            raise TrialError(f"{STARTS} starts did not finish the run")
        fault.lifts()
        _check_left(job, fault)
        job = Job(job.log.parent, outcome.layout)
    fault.lifts()
    return job


def _check_left(job: Job, fault: Fault) -> None:
    """Between two starts: what was finished before the fault is there and whole, unless the policy let it go."""
    left = job.finished()
    for step in fault.finished - left:
        if step not in POLICY.outdated(sorted(fault.finished | left)):
            raise TrialError(f"the finished checkpoint of step {step} is lost; there are {sorted(left)}")
    for step in left - fault.damaged:
        if problems := verify(job.checkpoints / f"step_{step:08d}"):
            raise TrialError(f"the finished checkpoint of step {step} is damaged: {problems[0]}")


def _check(job: Job, fault: Fault, outcome: Outcome, ending: Ending, undisturbed: Ending) -> None:
    log = job.log.read_text(errors="replace")
    starts = [int(step or 0) for step in BEGAN.findall(log)]
    outcome.restarts = len(starts) - 1
    noticed = {int(step) for step in PASSED_OVER.findall(log)}
    outcome.detected = len(noticed & fault.damaged)
    if noticed != fault.damaged:
        raise TrialError(f"damaged were {sorted(fault.damaged)}, passed over {sorted(noticed)}")
    sound = max(fault.finished - fault.damaged, default=0)
    if outcome.restarts:
        first = starts[1]
        if first < sound:
            raise TrialError(f"resumed from step {first}, the newest that verifies was {sound}")
        outcome.lost = max(fault.at - first, 0)
        # A save may last until the next one is due, which then waits for it.
        if outcome.lost > (2 + len(fault.damaged)) * INTERVAL:
            raise TrialError(f"{outcome.lost} steps were lost")
    if ending.files != undisturbed.files:
        differing = sorted(name for name in undisturbed.files if ending.files.get(name) != undisturbed.files[name])
        raise TrialError(f"the last checkpoint has other bytes than without the fault: {differing}")
    if ending.rows != undisturbed.rows:
        raise TrialError("metrics.jsonl tells another story than without the fault")
    # A save that a full disk did not take is told of, and lost unless a later start comes to its step again.
    not_saved = {int(step) for step in NOT_SAVED.findall(log)} if outcome.kind == "fill the disk" else set()
    if missing := set(undisturbed.kept) - set(ending.kept) - fault.damaged - not_saved:
        raise TrialError(f"checkpoints of steps {sorted(missing)} are not there at the end, only {ending.kept}")
    for step in set(ending.kept) - fault.damaged:
        if problems := verify(job.checkpoints / f"step_{step:08d}"):
            raise TrialError(f"at the end the checkpoint of step {step} is damaged: {problems[0]}")
    if outcome.restarts and job.hidden():
        raise TrialError(f"left over: {job.hidden()}")
