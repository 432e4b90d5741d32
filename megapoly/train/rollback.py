"""Back to a checkpoint before a spike, without the data around it (PaLM; Chowdhery et al. 2022, arXiv 2204.02311, 5.1).

Steps and samples keep their numbers: a batch that is left out is a step in which nothing happens, so that stages,
learning rates and the order of all other data stay as they are. What is left out is part of the data plan.
"""

import dataclasses
from pathlib import Path

import torch

from megapoly.checkpoint.load import CheckpointReader
from megapoly.checkpoint.rollbacks import Rollback, read_rollbacks, write_rollbacks
from megapoly.checkpoint.save import step_folder
from megapoly.checkpoint.storage import sync_directory, write_text
from megapoly.data.curriculum import Plan, united
from megapoly.data.loader import TrainLoader
from megapoly.errors import CheckpointError, Echo, TroubleError
from megapoly.parallel.collectives import all_reduce_
from megapoly.train.prepare import Prepared
from megapoly.train.setup import Run
from megapoly.train.trouble import Spike


def roll_back(run: Run, spike: Spike) -> Run | None:
    """The run as it goes on from a checkpoint before the spike; None where there is none to go back to.

    All ranks call it together. Raises TroubleError, on the main rank, after max_rollbacks.
    """
    mesh, cfg = run.mesh, run.cfg
    assert cfg.checkpoint.save is not None
    root, choice = Path(cfg.checkpoint.save), torch.zeros(2, dtype=torch.int64, device=mesh.device)
    done = read_rollbacks(root) if mesh.is_main else []
    if mesh.is_main:  # the others take its word: they may see another state of a shared disk
        choice.copy_(torch.tensor([_checkpoint_before(run, root, spike.step), len(done)]))
    step, number = all_reduce_(choice, mesh.world).tolist()
    run.watch.spike = None
    prepared = _going_back(run, root / step_folder(step), spike) if step else None
    if prepared is None:
        run.console.say(f"  step {spike.step}: no checkpoint before it, or no step after it: the run goes on")
        return None
    if number >= cfg.resilience.max_rollbacks:
        if not mesh.is_main:
            raise Echo("too many rollbacks")
        raise TroubleError(
            f"step {spike.step}: {spike}, after {number} rollbacks (max_rollbacks): lower lr or raise precision, "
            f"and go on from an earlier checkpoint; {root} has those before"
        )
    begin, end = prepared.plan.left_out[-1]
    if mesh.is_main:
        # The pointer first: after a kill between the two the run meets the spike again, and has no gap it never made.
        write_text(root / "latest", step_folder(step) + "\n")
        sync_directory(root)
        write_rollbacks(root, [*done, Rollback(spike.step, str(spike), step, begin, end)])
    run.console.say(f"  step {spike.step}: back to step {step}; samples {begin:,} to {end:,} are left out")
    prepared = dataclasses.replace(
        prepared, plan=dataclasses.replace(prepared.plan, left_out=united(prepared.plan.left_out))
    )
    old = run.loader
    loader = TrainLoader(prepared.plan, old.streams, old.deal, old.sizes, old.documents, old.infilling)
    return dataclasses.replace(run, prepared=prepared, loader=loader)


def _checkpoint_before(run: Run, root: Path, spike: int) -> int:
    """Step of the newest checkpoint at least rollback_steps before the spike, else of the oldest before it; or 0."""
    steps = [reader.step for reader in own_checkpoints(root, run.prepared.plan) if reader.step < spike]
    early = [step for step in steps if step <= spike - run.cfg.resilience.rollback_steps]
    return max(early, default=min(steps, default=0))


def own_checkpoints(root: Path, plan: Plan) -> list[CheckpointReader]:
    """Those that a run made on its way through a plan; what a rollback gave up has seen other samples."""
    found = []
    for folder in root.glob("step_*"):
        try:
            reader = CheckpointReader.open(folder)
        except CheckpointError:
            continue  # damaged, or of no step: nothing to go back to
        if reader.step > 0 and reader.state["plan_fingerprint"] == plan.fingerprint(reader.samples):
            found.append(reader)
    return found


def _going_back(run: Run, folder: Path, spike: Spike) -> Prepared | None:
    """What is prepared with that checkpoint to start from, and what is left out last in the plan; None for nothing."""
    prepared = dataclasses.replace(run.prepared, checkpoint=CheckpointReader.open(folder), is_resume=True)
    batches = run.cfg.resilience.rollback_batches
    first = max(prepared.start_step, spike.step - 1 - batches // 2)
    last = min(first + batches, prepared.num_steps - 1)  # the run's last step, which evaluates and saves, is never
    if last < spike.step:
        return None
    begin, end = prepared.samples_after(first), prepared.samples_after(last)
    plan = dataclasses.replace(prepared.plan, left_out=(*prepared.plan.left_out, (begin, end)))
    return dataclasses.replace(prepared, plan=plan, changes=())
