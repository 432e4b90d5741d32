"""What a run starts from: the newest checkpoint that every rank can read, or nothing."""

from pathlib import Path

from megapoly.checkpoint.load import load_checkpoint
from megapoly.errors import CheckpointError, DamageError, Echo
from megapoly.train.prepare import Prepared, with_start
from megapoly.train.setup import Run


def load_start(run: Run) -> Run:
    """Load what the run starts from; where any rank finds its part damaged, all take an older checkpoint instead.

    Returns the run as it then starts. Raises CheckpointError, on the main rank, where no checkpoint is whole.
    """
    while (checkpoint := run.prepared.checkpoint) is not None:
        try:
            load_state(run)
        except DamageError as damage:
            skipped = {**run.prepared.skipped, checkpoint.folder: str(damage)}
            run = run.starting_from(_with_older(run, skipped))
            continue
        break
    return run


def load_state(run: Run) -> None:
    """Load the checkpoint that the run starts from, if any; DamageError, on all ranks alike, where it is damaged."""
    checkpoint, takes_all = run.prepared.checkpoint, run.prepared.takes_full_state
    if checkpoint is None:
        return
    load_checkpoint(checkpoint, run.optimizer, weights_only=not takes_all)
    if takes_all:
        run.loss_scaler.restore(checkpoint.loss_scaler)
        run.watch.restore(checkpoint.watch)
        run.optimizer.num_steps = checkpoint.optimizer_steps


def _with_older(run: Run, skipped: dict[Path, str]) -> Prepared:
    try:
        return with_start(run.prepared, skipped)
    except CheckpointError:
        if run.mesh.is_main:
            raise
        raise Echo("the main rank says which checkpoints are damaged") from None
