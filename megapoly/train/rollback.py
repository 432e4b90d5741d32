"""Back to a checkpoint before a spike, without the data around it (PaLM; Chowdhery et al. 2022, arXiv 2204.02311, 5.1).

Steps and samples keep their numbers: a batch that is left out is a step in which nothing happens, so that stages,
learning rates and the order of all other data stay as they are. What is left out is part of the data plan.
"""

import dataclasses
import secrets
from collections.abc import Iterable
from pathlib import Path

import torch

from megapoly.checkpoint.folders import go_back, roots_of, step_folders, step_name
from megapoly.checkpoint.load import CheckpointReader
from megapoly.checkpoint.rollbacks import Rollback, rollbacks_of, write_rollbacks
from megapoly.data.curriculum import Plan, united
from megapoly.errors import CheckpointError, Echo, TroubleError
from megapoly.parallel.collectives import all_reduce_
from megapoly.train.prepare import Prepared
from megapoly.train.setup import Run
from megapoly.train.trouble import Spike


def roll_back(run: Run, spike: Spike) -> Run | None:
    """The run as it goes on from a checkpoint before the spike; None where there is none to go back to.

    All ranks call it together, while no save is under way. Raises TroubleError, on the main rank, after max_rollbacks.
    """
    mesh, cfg = run.mesh, run.cfg
    roots, choice = roots_of(cfg.checkpoint), torch.zeros(3, dtype=torch.int64, device=mesh.device)
    done = rollbacks_of(roots) if mesh.is_main else []
    if mesh.is_main:  # the others take its word: they may see another state of a shared disk
        choice.copy_(torch.tensor([*_checkpoint_before(run, roots, spike.step), len(done)]))
    step, place, number = all_reduce_(choice, mesh.world).tolist()
    run.watch.spike = None
    prepared = _going_back(run, roots[place] / step_name(step), spike) if step else None
    if prepared is None:
        why = "no step after it" if step else "no checkpoint before it (--save-interval says how often one is made)"
        run.console.say(f"  step {spike.step}: {why}: the run goes on")
        return None
    if number >= cfg.resilience.max_rollbacks:
        if not mesh.is_main:
            raise Echo("too many rollbacks")
        raise TroubleError(
            f"step {spike.step}: {spike}, after {number} rollbacks (max_rollbacks): lower lr or raise precision, "
            f"and go on from an earlier checkpoint; {roots[0]} has those before"
        )
    begin, end = prepared.plan.left_out[-1]
    if mesh.is_main:
        _write(roots, step, [*done, Rollback(spike.step, str(spike), step, begin, end)])
    run.console.say(f"  step {spike.step}: back to step {step}; samples {begin:,} to {end:,} are left out")
    if end == prepared.samples_after(prepared.num_steps - 1):
        batches = cfg.resilience.rollback_batches
        run.console.say(
            f"  warning: of what was left of the run, rollback_batches ({batches}) spares the last step only"
        )
    plan = dataclasses.replace(prepared.plan, left_out=united(prepared.plan.left_out))
    return run.starting_from(dataclasses.replace(prepared, plan=plan))


def _write(roots: list[Path], step: int, rollbacks: list[Rollback]) -> None:
    """Make a step's checkpoint the newest, then say why: after a kill between the two the run meets the spike again."""
    token = secrets.token_hex(4)
    try:
        for root in roots:
            go_back(root, step, token)
        for root in roots:
            write_rollbacks(root, rollbacks)
    except OSError as error:
        where = error.filename or roots[0]
        raise CheckpointError(f"{where}: going back to step {step} cannot be written: {error.strerror}") from None


def _checkpoint_before(run: Run, roots: list[Path], spike: int) -> tuple[int, int]:
    """Step of the newest checkpoint at least rollback_steps before the spike, else of the oldest before it; or 0.

    And the number of the directory that has it.
    """
    folders = (folder for root in roots for folder in step_folders(root) if folder not in run.prepared.skipped)
    own = [reader for reader in checkpoints_of(run.prepared.plan, folders) if reader.step < spike]
    steps = [reader.step for reader in own]
    early = [step for step in steps if step <= spike - run.cfg.resilience.rollback_steps]
    step = max(early, default=min(steps, default=0))
    return step, next((roots.index(reader.folder.parent) for reader in own if reader.step == step), 0)


def has_way_of(reader: CheckpointReader, plan: Plan) -> bool:
    """Whether a checkpoint was made on the way through a plan: by steps, with just its samples."""
    return reader.step > 0 and reader.state["plan_fingerprint"] == plan.fingerprint(reader.samples)


def checkpoints_of(plan: Plan, folders: Iterable[Path]) -> list[CheckpointReader]:
    """Those that a run made on its way through a plan; what a rollback gave up has seen other samples."""
    found = []
    for folder in folders:
        try:
            reader = CheckpointReader.at(folder)
        except CheckpointError:
            continue  # damaged: nothing to go back to
        if has_way_of(reader, plan):
            found.append(reader)
    return found


def _going_back(run: Run, folder: Path, spike: Spike) -> Prepared | None:
    """What is prepared with that checkpoint to start from, and what is left out last in the plan; None for nothing."""
    prepared = dataclasses.replace(run.prepared, checkpoint=CheckpointReader.at(folder), is_resume=True, skipped={})
    batches = run.cfg.resilience.rollback_batches
    first = max(prepared.start_step, spike.step - 1 - batches // 2)
    last = min(first + batches, prepared.num_steps - 1)  # the run's last step, which evaluates and saves, is never
    if last < spike.step:
        return None
    begin, end = prepared.samples_after(first), prepared.samples_after(last)
    plan = dataclasses.replace(prepared.plan, left_out=(*prepared.plan.left_out, (begin, end)))
    return dataclasses.replace(prepared, plan=plan, changes=())
