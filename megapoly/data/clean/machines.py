"""Where cleaning runs: processes of this machine, jobs of Slurm, a cluster of Ray."""

import importlib.util
import shutil
from dataclasses import dataclass, field

from megapoly.errors import ConfigError

EXECUTORS = ("local", "slurm", "ray")


@dataclass(frozen=True)
class Machines:
    """Where stages run: tasks at once, and for Slurm partition, time and further arguments of sbatch by name."""

    executor: str = "local"
    workers: int = 1
    partition: str = ""
    time: str = "24:00:00"
    gib_per_task: int = 4
    sbatch: dict[str, str] = field(default_factory=dict)


def check_machines(machines: Machines) -> None:
    """Raise ConfigError for what an executor lacks, before any work."""
    if machines.workers < 1:
        raise ConfigError(f"--workers ({machines.workers}) must be 1 or more")
    if machines.executor == "slurm":
        if not machines.partition:
            raise ConfigError("--executor slurm needs --partition")
        if shutil.which("sbatch") is None:
            raise ConfigError("--executor slurm: no sbatch is found; start it where jobs are submitted")
    elif machines.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError("--executor ray needs the package ray; pip install ray")
    elif machines.executor not in EXECUTORS:
        raise ConfigError(f"--executor must be one of {', '.join(EXECUTORS)}, not '{machines.executor}'")
