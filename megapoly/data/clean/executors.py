"""Running stages by datatrove's executors: processes of this machine, jobs of Slurm, or a cluster of Ray.

datatrove marks each task that is done by a file, and what is marked is not run again. Its own log of each task lies in
WORK/logs/STAGE/logs. To Slurm it hands the steps in a pickle (dill) that it has just written there itself.
"""

import gc
import io
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.logging import logger

from megapoly.data.clean.machines import Machines
from megapoly.data.clean.stage import Stage
from megapoly.errors import DataError, MegapolyError
from megapoly.log import duration

PROGRESS_SECONDS = 5.0


def run_stages(stages: Sequence[Stage], folder: Path, machines: Machines, log: Callable[[str], None]) -> bool:
    """Run what is not done yet, stage after stage; whether all of it is done (Slurm: handed over).

    Raises DataError where a task fails.
    """
    logger.remove()  # datatrove speaks to its log files only
    if machines.executor == "slurm":
        _submit(stages, folder, machines, log)
        return False
    if machines.executor == "ray":
        _run_on_ray(stages, folder, machines, log)
    else:
        _run_here(stages, folder, machines, log)
    return True


def _logs(folder: Path, stage: Stage) -> str:
    return str(folder.absolute() / "logs" / stage.name)


# ------------------------------------------------------------------------------------------------- this machine


class _Silence(io.TextIOBase):
    """Takes what datatrove prints for a terminal; the same lies in the task's log."""

    def write(self, text: str) -> int:
        return len(text)


class LocalTasks(LocalPipelineExecutor):
    """datatrove's local executor with a pool that outlives a stage and notices when a process is killed."""

    def run_task(self, rank: int) -> None:
        """Run one task in this process."""
        logger.remove()
        with redirect_stderr(_Silence()):
            self._run_for_rank(rank, rank)
            logger.remove()


def _run_here(stages: Sequence[Stage], folder: Path, machines: Machines, log: Callable[[str], None]) -> None:
    executors = [
        LocalTasks(stage.steps, tasks=stage.tasks, workers=machines.workers, logging_dir=_logs(folder, stage))
        for stage in stages
    ]
    if all(not executor.get_incomplete_ranks() for executor in executors):
        return
    if machines.workers == 1:
        for stage, executor in zip(stages, executors, strict=True):
            _run_stage(stage, executor, None, 1, log)
        return
    failure = _run_in_processes(stages, executors, machines.workers, log)
    gc.collect()  # the pool's semaphores: who ends this process by os._exit would leave them behind
    if failure is not None:
        raise failure


def _run_in_processes(
    stages: Sequence[Stage], executors: Sequence[LocalTasks], workers: int, log: Callable[[str], None]
) -> Exception | None:
    """Run all stages in one pool; returns what failed of input or disk, without the frames that keep the pool alive."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megapoly.data.clean.steps", "megapoly.data.clean.dedup"])
    with ProcessPoolExecutor(workers, context) as pool:
        try:
            for stage, executor in zip(stages, executors, strict=True):
                _run_stage(stage, executor, pool, workers, log)
        except BrokenProcessPool:
            return DataError(
                f"stage {stage.name}: a process was killed, for want of memory perhaps; the same command goes on, "
                "with fewer --workers it needs less"
            )
        except (MegapolyError, OSError) as error:
            pool.shutdown(cancel_futures=True)
            return error.with_traceback(None)
    return None


def _run_stage(
    stage: Stage,
    executor: LocalTasks,
    pool: ProcessPoolExecutor | None,
    workers: int,
    log: Callable[[str], None],
) -> None:
    ranks = executor.get_incomplete_ranks()
    if not ranks:
        return
    begin = said = time.monotonic()
    done = stage.tasks - len(ranks)
    if done:
        log(f"{stage.name}: {done} of {stage.tasks} tasks are done already")
    for count in _run_tasks(ranks, executor, pool, workers):
        done += count
        if time.monotonic() - said > PROGRESS_SECONDS and done < stage.tasks:
            said = time.monotonic()
            log(f"{stage.name}: {done} of {stage.tasks} tasks, {duration(said - begin)}")
    log(f"{stage.name}: {stage.tasks} tasks, {duration(time.monotonic() - begin)}")


def _run_tasks(
    ranks: Sequence[int], executor: LocalTasks, pool: ProcessPoolExecutor | None, workers: int
) -> Iterator[int]:
    """Run tasks here or in the pool; yields how many have ended, whenever some have. Raises what a task raises."""
    if pool is None:
        steps = executor.pipeline
        for rank in ranks:
            executor.pipeline = deepcopy(steps)  # steps count what they see
            executor.run_task(rank)
            yield 1
        return
    waiting = iter(ranks)
    running = {pool.submit(executor.run_task, rank) for rank in islice(waiting, workers)}
    while running:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            future.result()
        running |= {pool.submit(executor.run_task, rank) for rank in islice(waiting, len(finished))}
        yield len(finished)


# ------------------------------------------------------------------------------------------------- clusters


def _submit(stages: Sequence[Stage], folder: Path, machines: Machines, log: Callable[[str], None]) -> None:
    """Hand all stages to Slurm as arrays of jobs, each of which waits for the one before it."""
    before: SlurmPipelineExecutor | None = None
    executors = []
    for stage in stages:
        before = slurm_executor(stage, folder, machines, before)
        executors.append(before)
    for stage, executor in zip(stages, executors, strict=True):
        try:
            executor.launch_job()
        except subprocess.CalledProcessError as error:
            raise DataError(
                f"stage {stage.name}: sbatch ended with status {error.returncode}; see its message"
            ) from None
        is_new = executor.job_id != -1
        log(f"{stage.name}: {f'job {executor.job_id}' if is_new else 'done already'}, {stage.tasks} tasks")


def slurm_executor(
    stage: Stage, folder: Path, machines: Machines, before: SlurmPipelineExecutor | None
) -> SlurmPipelineExecutor:
    """datatrove's executor for a stage; its jobs run in this interpreter's virtual environment."""
    activate = Path(sys.prefix, "bin", "activate")
    return SlurmPipelineExecutor(
        deepcopy(stage.steps),
        tasks=stage.tasks,
        time=machines.time,
        partition=machines.partition,
        mem_per_cpu_gb=machines.gib_per_task,
        workers=machines.workers,
        job_name=f"clean-{stage.name}",
        qos="",
        venv_path=str(activate) if activate.is_file() else None,
        sbatch_args=machines.sbatch,
        depends=before,
        logging_dir=_logs(folder, stage),
    )


def _run_on_ray(stages: Sequence[Stage], folder: Path, machines: Machines, log: Callable[[str], None]) -> None:
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # the cluster that RAY_ADDRESS names or that runs here, else one for this run
    for stage in stages:
        executor = ray_executor(stage, folder, machines)
        logger.remove()
        begin = time.monotonic()
        executor.run()
        refuse_incomplete(executor, stage, folder)
        log(f"{stage.name}: {stage.tasks} tasks, {duration(time.monotonic() - begin)}")


def ray_executor(stage: Stage, folder: Path, machines: Machines) -> RayPipelineExecutor:
    """datatrove's executor for a stage on the cluster of Ray."""
    return RayPipelineExecutor(
        stage.steps,
        tasks=stage.tasks,
        workers=machines.workers,
        mem_per_cpu_gb=machines.gib_per_task,
        logging_dir=_logs(folder, stage),
        ray_remote_kwargs={"runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}},
    )


def refuse_incomplete(executor: PipelineExecutor, stage: Stage, folder: Path) -> None:
    """Raise DataError where tasks of a stage are not done: an executor may end without saying so."""
    left: list[Any] = executor.get_incomplete_ranks()
    if left:
        log_file = Path(_logs(folder, stage), "logs", f"task_{left[0]:05d}.log")
        raise DataError(f"stage {stage.name}: {len(left)} of {stage.tasks} tasks failed; see {log_file}")
