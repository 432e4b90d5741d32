"""Training with Muon, with muP, and with both: any layout gives the losses and gradients of one process."""

import functools
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from test_parity import STEPS, assert_same_training, steps_of
from tiny_runs import tiny_config

OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon"},
    "muP": {"use_mup": True, "mup_base_hidden_size": 48, "lr": 3e-3},
    "muon, muP": {
        "optimizer": "muon",
        "use_mup": True,
        "mup_base_hidden_size": 36,
        "no_weight_decay_embeddings": True,
        "lr": 3e-3,
    },
}


@functools.cache
def reference(family: str, options: str, folder: Path) -> dict[str, Any]:
    return run_ranks(steps_of, tiny_config(folder, family, STEPS, **OPTIONS[options]))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize(
    ("options", "family", "tp", "pp", "dp", "instances"),
    [
        ("muon", "llama", 2, 1, 2, 1),
        ("muon", "gpt2", 1, 2, 4, 2),
        ("muon, muP", "gpt_neox", 2, 2, 2, 1),
        ("muP", "llama", 2, 2, 1, 1),
    ],
)
def test_every_layout_trains_like_one_process(
    options: str, family: str, tp: int, pp: int, dp: int, instances: int, folder: Path
) -> None:
    cfg = tiny_config(
        folder, family, STEPS, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=tp > 1,
        num_distributed_optimizer_instances=instances, ddp_bucket_size=100_000, **OPTIONS[options],
    )  # fmt: skip
    for of_rank in run_ranks(steps_of, cfg, tp=tp, pp=pp, dp=dp, instances=instances):
        assert_same_training(of_rank, reference(family, options, folder))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_learns(options: str, folder: Path) -> None:
    losses = reference("llama", options, folder)["losses"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.3, losses
