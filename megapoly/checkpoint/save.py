"""Writing a checkpoint: a temporary folder, every rank's own shard, one rename, `latest` last."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megapoly.checkpoint.state import PieceSavePlanner, pieces, training_state
from megapoly.checkpoint.storage import Writer, sync_directory, write_text
from megapoly.errors import CheckpointError
from megapoly.optim.sharded import ShardedOptimizer
from megapoly.tokenizer.load import Tokenizer


def step_folder(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:08d}"


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def save_checkpoint(
    root: Path, step: int, optimizer: ShardedOptimizer, state: dict[str, Any], tokenizer: Tokenizer | None
) -> Path:
    """Write the state of all ranks as root/step_XXXXXXXX and point `latest` at it; all ranks call it together.

    `state` is plain data (step, samples, configuration) for state.json; the tokenizer's files are put beside it, so
    that the checkpoint is whole by itself. Raises CheckpointError where it cannot be written.
    """
    mesh = optimizer.buffers.mesh
    final = root / step_folder(step)
    temporary = root / f".{step_folder(step)}.tmp"
    try:
        if mesh.is_main:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        _barrier()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
            dcp.save(
                {},
                storage_writer=Writer(temporary, mesh.world.rank),
                planner=PieceSavePlanner(pieces(optimizer.buffers, training_state(optimizer), for_saving=True)),
                no_dist=not dist.is_initialized(),
            )
        if mesh.is_main:
            _copy_tokenizer(tokenizer, temporary)
            write_text(temporary / "state.json", json.dumps(state, indent=1, ensure_ascii=False))
            sync_directory(temporary)
            if final.exists():  # a resume from an earlier step reached this one again
                shutil.rmtree(final)
            temporary.rename(final)
            sync_directory(root)
            write_text(root / "latest", final.name + "\n")
            sync_directory(root)
        _barrier()
    except (OSError, dcp.CheckpointException) as error:
        causes = [failure[0] for failure in getattr(error, "failures", {}).values()] or [error]
        raise CheckpointError(f"{final}: cannot be written: {causes[0]}") from None
    return final


def _copy_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    """The tokenizer's own files under their usual names."""
    if tokenizer is None:
        return
    path = Path(tokenizer.path)
    if tokenizer.tokenizer_type == "SentencePieceTokenizer":
        shutil.copyfile(path, folder / "tokenizer.model")
        return
    home = path if path.is_dir() else path.parent
    shutil.copyfile(home / "tokenizer.json" if path.is_dir() else path, folder / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
