"""A run whose batch grows: resumed anywhere it is the same run, and another past is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import run_to_end, tiny_config, tiny_prepared

from megapoly.errors import CheckpointError, ConfigError
from megapoly.sections import Config
from megapoly.train.prepare import with_start

RAMP = [2, 2, 18]  # batches of 2, 4, 6 for 6 samples each, then 8
SAMPLES = [2, 4, 6, 10, 14, 20, 28, 36, 40]


def rows(cfg: Config) -> list[dict[str, Any]]:
    text = Path(cfg.logging.run_dir, "metrics.jsonl").read_text()
    kept = ("step", "samples", "tokens", "stage", "loss", "lr", "tokens_by_source", "grad_norm")
    return [{key: json.loads(line)[key] for key in kept} for line in text.splitlines()]


def ramped(folder: Path, name: str, **options: Any) -> Config:
    run_dir = str(folder / name)
    return tiny_config(folder, "gpt2", 5, rampup_batch_size=RAMP, run_dir=run_dir, num_layers=1, **options)


def test_a_ramp_resumed_in_its_midst_is_bit_equal_and_counts_right(tmp_path: Path) -> None:
    straight = ramped(tmp_path, "straight")
    expected = run_ranks(run_to_end, straight, dp=2)[0]
    assert [row["samples"] for row in rows(straight)] == SAMPLES
    assert [row["tokens"] for row in rows(straight)] == [16 * n for n in SAMPLES]
    sizes = [sum(row["tokens_by_source"].values()) for row in rows(straight)]
    assert sizes == [16 * n for n in (2, 2, 2, 4, 4, 6, 8, 8, 4)]  # the last one is what the budget leaves
    resumed = {}
    for interval in (4, 5, None):  # in a stretch, at its border, to the end
        resumed = run_ranks(run_to_end, ramped(tmp_path, "parts", exit_interval=interval), dp=2)[0]
    assert rows(ramped(tmp_path, "parts")) == rows(straight)
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), f"{name} differs after resuming"
    other = ramped(tmp_path, "other")  # a changed layout goes on with the same batches
    run_ranks(run_to_end, dataclasses.replace(other, train=dataclasses.replace(other.train, exit_interval=4)), dp=2)
    run_ranks(run_to_end, other)
    for mine, theirs in zip(rows(other), rows(straight), strict=True):
        assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)
        assert mine.pop("grad_norm") == pytest.approx(theirs.pop("grad_norm"), rel=1e-4)
        assert mine == theirs


def starting_point(cfg: Config) -> None:
    with_start(tiny_prepared(cfg), {})


def test_another_ramp_is_refused_unless_its_past_is_the_same(tmp_path: Path) -> None:
    run_ranks(run_to_end, ramped(tmp_path, "run", exit_interval=5))
    starting_point(ramped(tmp_path, "run"))

    def other(ramp: list[int] | None, size: int = 8) -> Config:
        return tiny_config(tmp_path, "gpt2", 5, num_layers=1, global_batch_size=size, rampup_batch_size=ramp)

    for ramp, size in ((None, 8), ([4, 4, 18], 8), ([2, 2, 24], 8), ([2, 2, 18], 10)):
        with pytest.raises(CheckpointError, match="14 samples came in batches of 8 after a ramp of 2,2,18") as caught:
            starting_point(other(ramp, size))
        assert f"not of {size}" in str(caught.value)
    starting_point(other([2, 2, 24], 10))  # 2, 4, .. at the same samples: only what is to come differs


def test_train_iters_counts_the_steps_of_the_ramp(tmp_path: Path) -> None:
    prepared = tiny_prepared(ramped(tmp_path, "run", train_iters=4))
    assert (prepared.num_samples, prepared.num_steps) == (10, 4)
    assert tiny_prepared(ramped(tmp_path, "run", train_iters=9)).num_steps == 9
    with pytest.raises(ConfigError, match="train_iters would need 52 samples"):
        tiny_prepared(ramped(tmp_path, "run", train_iters=10))
