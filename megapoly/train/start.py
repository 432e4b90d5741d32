"""What a run starts from: the newest checkpoint that every rank can read, or nothing."""

from dataclasses import replace
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
        prepared = run.prepared
        try:
            load_checkpoint(checkpoint, run.optimizer, weights_only=not prepared.takes_full_state)
        except DamageError as damage:
            run = replace(run, prepared=_with_older(run, {**prepared.skipped, checkpoint.folder: str(damage)}))
            continue
        if prepared.takes_full_state:
            run.loss_scaler.restore(checkpoint.loss_scaler)
            run.optimizer.num_steps = checkpoint.optimizer_steps
        break
    return run


def _with_older(run: Run, skipped: dict[Path, str]) -> Prepared:
    try:
        return with_start(run.prepared, skipped)
    except CheckpointError:
        if run.mesh.is_main:
            raise
        raise Echo("the main rank says which checkpoints are damaged") from None
