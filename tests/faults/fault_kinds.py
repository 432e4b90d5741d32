"""The faults of trials: when each comes, and what it does to a running job or to what is left of one."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fault_jobs import INTERVAL, STEPS, Job, kill

from megapoly.checkpoint.folders import step_folders

POLL = 0.0005  # seconds between two looks at the folder of checkpoints
DISK_BYTES = 64 << 20


@dataclass
class Fault:
    """What was done to a job; `at` is the last step it had written down, `finished` the checkpoints it had."""

    moment: str
    at: int
    finished: set[int]
    damaged: set[int] = field(default_factory=set)  # steps whose checkpoints were damaged
    lifts: Callable[[], None] = lambda: None  # makes a new start possible


class MissedError(Exception):
    """The job was over before the moment came."""


def until(job: Job, condition: Callable[[], object]) -> None:
    """Wait for a condition of the running job, in short naps."""
    while not condition():
        if job.is_over or job.last_step() >= STEPS:
            raise MissedError
        time.sleep(POLL)


def at_random(job: Job, rng: random.Random, first: int = 0) -> None:
    """Wait for a step and some milliseconds more; step 0 is the start of the job."""
    step = rng.randrange(min(first, STEPS - 2), STEPS - 1)
    until(job, lambda: job.ranks() if step == 0 else job.last_step() >= step)
    time.sleep(rng.uniform(0, 5.0 if step == 0 else 0.3))


def strike(job: Job, victims: list[int | None], number: int = signal.SIGKILL) -> Fault:
    """Send a signal to processes, and say where that met the checkpoints."""
    fault = Fault("", job.last_step(), job.finished())
    for process in victims:
        kill(process, number)
    hidden = job.hidden()
    fault.moment = "steps"
    if any(name.endswith(".old") for name in hidden):
        fault.moment = "deletion"
    elif hidden:
        inside = {path.name for name in hidden for path in (job.checkpoints / name).glob("*")}
        fault.moment = "rename" if any(name.startswith("metadata") for name in inside) else "save"
    elif not fault.at:
        fault.moment = "start"
    return fault


def some_rank(job: Job, rng: random.Random) -> list[int | None]:
    """The process of one rank."""
    ranks = job.ranks()
    return [ranks[rng.choice(sorted(ranks))]] if ranks else []


def everyone(job: Job, rng: random.Random) -> list[int | None]:
    """The agent's and all ranks' processes, in any order."""
    processes: list[int | None] = [job.agent.pid, *job.ranks().values()]
    rng.shuffle(processes)
    return processes


def kill_rank(job: Job, rng: random.Random) -> Fault:
    at_random(job, rng)
    return strike(job, some_rank(job, rng))


def kill_job(job: Job, rng: random.Random) -> Fault:
    at_random(job, rng)
    return strike(job, everyone(job, rng))


def kill_agent(job: Job, rng: random.Random) -> Fault:
    at_random(job, rng)
    return strike(job, [job.agent.pid])


def _kill_at(job: Job, rng: random.Random, sign: Callable[[], object], delay: float) -> Fault:
    """Kill the main rank, any rank or everyone shortly after a sign."""
    step = rng.randrange(0, STEPS - INTERVAL)
    until(job, lambda: job.last_step() >= step)
    main = job.ranks().get(0)
    victims = rng.choice([[main], some_rank(job, rng), everyone(job, rng)])
    until(job, sign)
    time.sleep(rng.uniform(0, delay))
    return strike(job, victims)


def kill_in_save(job: Job, rng: random.Random) -> Fault:
    return _kill_at(job, rng, job.hidden, 0.06)


def kill_in_rename(job: Job, rng: random.Random) -> Fault:
    return _kill_at(job, rng, lambda: any(job.checkpoints.glob(".step_*.tmp/metadata*")), 0.006)


def kill_in_pruning(job: Job, rng: random.Random) -> Fault:
    return _kill_at(job, rng, lambda: any(name.endswith(".old") for name in job.hidden()), 0.002)


def freeze_rank(job: Job, rng: random.Random) -> Fault:
    """SIGSTOP; the others have to end without it."""
    at_random(job, rng, first=1)
    return strike(job, some_rank(job, rng), signal.SIGSTOP)


def freeze_rank_briefly(job: Job, rng: random.Random) -> Fault:
    """SIGSTOP and SIGCONT: it may cost nothing but time."""
    at_random(job, rng, first=1)
    victims = some_rank(job, rng)
    fault = strike(job, victims, signal.SIGSTOP)
    time.sleep(rng.uniform(0.1, 4))
    strike(job, victims, signal.SIGCONT)
    return fault


def _killed(job: Job, rng: random.Random) -> Fault:
    until(job, lambda: len(job.finished()) > 1)
    at_random(job, rng, first=job.last_step())
    fault = strike(job, everyone(job, rng))
    job.wait()
    return fault


def _newest(job: Job, rng: random.Random) -> list[Path]:
    """The newest checkpoint and now and then the one before as well, as long as one is left."""
    found = step_folders(job.checkpoints)
    return found[: min(rng.choice([1, 1, 2]), len(found) - 1)]


def flip_bytes(job: Job, rng: random.Random) -> Fault:
    """After a kill of everyone: a bit of any file of the newest checkpoints."""
    fault = _killed(job, rng)
    for folder in _newest(job, rng):
        path = rng.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        # Half of them near the beginning, where a shard has its header.
        content[rng.randrange(rng.choice([len(content), min(len(content), 4000)]))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        fault.damaged.add(int(folder.name[5:]))
        fault.moment = f"flip in {path.name}"
    return fault


def truncate_files(job: Job, rng: random.Random) -> Fault:
    """After a kill of everyone: any file of the newest checkpoints loses its end, or is not there."""
    fault = _killed(job, rng)
    for folder in _newest(job, rng):
        path = rng.choice(sorted(folder.iterdir()))
        if rng.random() < 0.2:
            path.unlink()
        else:
            os.truncate(path, rng.randrange(path.stat().st_size))
        fault.damaged.add(int(folder.name[5:]))
        fault.moment = f"cut {path.name}"
    return fault


def fill_disk(job: Job, rng: random.Random) -> Fault:
    """Fill the file system of the checkpoints, or of the whole run; for a while, or until the job has ended."""
    at_random(job, rng, first=1)
    fault = Fault("disk", job.last_step(), job.finished())
    if not os.path.ismount(job.run) and not os.path.ismount(job.checkpoints):
        return _limit_files(job, fault)
    filler = job.checkpoints / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    fault.lifts = lambda: filler.unlink(missing_ok=True)
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.3, 2))
        fault.lifts()
    return fault


def _limit_files(job: Job, fault: Fault) -> Fault:
    """Where no file system may be mounted: no file of the ranks may be longer than half a shard."""
    sizes = [path.stat().st_size for path in job.checkpoints.glob("step_*/shard_*")]
    for process in job.ranks().values():
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (max([100_000, *sizes]) // 2, resource.RLIM_INFINITY))
    return fault


@contextlib.contextmanager
def a_disk(folder: Path, rng: random.Random) -> Iterator[None]:
    """A small file system for the run of a trial or for its checkpoints alone, where it may be mounted."""
    place = folder / rng.choice(["run", "run/checkpoints"])
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


KINDS: dict[str, Callable[[Job, random.Random], Fault]] = {
    "kill a rank": kill_rank,
    "kill the job": kill_job,
    "kill the agent": kill_agent,
    "kill in a save": kill_in_save,
    "kill in the rename": kill_in_rename,
    "kill in pruning": kill_in_pruning,
    "flip bits": flip_bytes,
    "truncate files": truncate_files,
    "fill the disk": fill_disk,
    "freeze a rank": freeze_rank,
    "freeze briefly": freeze_rank_briefly,
}
