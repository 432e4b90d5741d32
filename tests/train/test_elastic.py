"""A job that starts again with fewer or more ranks goes on with the same samples and the same global batch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_runs import tiny_config, tiny_prepared

from megapoly.checkpoint.load import CheckpointReader
from megapoly.data.batch import Batch
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.loop import train
from megapoly.train.setup import build_run

STEPS = 8


def go(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    """Train to the end or exit_interval, resuming; the sequences of each step over all replicas, and micro-batches."""
    prepared = tiny_prepared(cfg)
    if Path(cfg.logging.run_dir, "checkpoints/latest").exists():
        reader = CheckpointReader.open(cfg.logging.run_dir)
        prepared = dataclasses.replace(prepared, checkpoint=reader, is_resume=True)
    run = build_run(prepared, mesh)
    read, seen, microbatches = run.loader.batch, {}, set()

    def reading(first: int, end: int) -> list[Batch]:
        batches = read(first, end)
        microbatches.add(len(batches))
        mine = [row.tolist() for batch in batches for row in batch.tokens]
        everyone: list[Any] = [mine]
        if mesh.dp.size > 1:
            everyone = [None] * mesh.dp.size
            dist.all_gather_object(everyone, mine, group=mesh.dp.group)
        seen[str(first)] = sorted(row for rows in everyone for row in rows)
        return batches

    run.loader.batch = reading
    train(run)
    (count,) = microbatches
    return {"seen": seen, "microbatches": count}


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == [8 * step for step in range(1, STEPS + 1)]
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 1), (1, 2)])
def test_other_ranks_go_on_with_the_same_samples(before: int, after: int, tmp_path: Path) -> None:
    def cfg(name: str, **options: Any) -> Config:
        small = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "eval_iters": 1}
        return tiny_config(tmp_path, "gpt2", STEPS, run_dir=str(tmp_path / name), **small, **options)

    straight = run_ranks(go, cfg("straight"), dp=before)[0]
    first = run_ranks(go, cfg("parts", exit_interval=3), dp=before)[0]
    second = run_ranks(go, cfg("parts"), dp=after)[0]
    assert first["microbatches"] == 8 // before and second["microbatches"] == 8 // after
    assert list(second["seen"]) == [str(8 * step) for step in range(3, STEPS)]
    assert first["seen"] | second["seen"] == straight["seen"]
    eps = torch.finfo(torch.float32).eps
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "straight"), rel=64 * eps)
