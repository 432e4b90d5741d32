"""Writing a checkpoint: a temporary folder, every rank's own shard, one rename, `latest` last."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megapoly.checkpoint.state import PieceSavePlanner, pieces, training_state
from megapoly.checkpoint.storage import Writer, sync_directory, write_json
from megapoly.optim.sharded import ShardedAdamW


def step_folder(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:08d}"


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def save_checkpoint(root: Path, step: int, optimizer: ShardedAdamW, state: dict[str, Any]) -> Path:
    """Write the state of all ranks as root/step_XXXXXXXX and point `latest` at it; all ranks call it together.

    `state` is plain data (step, samples, configuration) for state.json.
    """
    mesh = optimizer.buffers.mesh
    final = root / step_folder(step)
    temporary = root / f".{step_folder(step)}.tmp"
    if mesh.is_main:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    _barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what was asked for
        dcp.save(
            {},
            storage_writer=Writer(temporary, mesh.world.rank),
            planner=PieceSavePlanner(pieces(optimizer.buffers, training_state(optimizer), for_saving=True)),
            no_dist=not dist.is_initialized(),
        )
    if mesh.is_main:
        write_json(temporary / "state.json", state)
        sync_directory(temporary)
        if final.exists():  # a resume from an earlier step reached this one again
            shutil.rmtree(final)
        temporary.rename(final)
        sync_directory(root)
        pointer = root / "latest.tmp"
        pointer.write_text(final.name + "\n", encoding="utf-8")
        pointer.replace(root / "latest")
        sync_directory(root)
    _barrier()
    return final
