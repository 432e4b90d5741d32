"""Context parallel: any share of the sequences trains like one process."""

import functools
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from test_parity import STEPS, assert_same_training, steps_of
from tiny_runs import tiny_config


@functools.cache
def reference(family: str, folder: Path) -> dict[str, Any]:
    return run_ranks(steps_of, tiny_config(folder, family, STEPS))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize(
    ("family", "cp", "tp", "pp", "dp"),
    [
        ("gpt2", 2, 1, 1, 1),
        ("llama", 4, 1, 1, 1),
        ("gpt_neox", 2, 2, 1, 1),
        ("llama", 2, 2, 2, 1),
        ("gpt2", 2, 2, 1, 2),
        ("gpt_neox", 4, 1, 2, 1),
    ],
)
def test_every_layout_trains_like_one_process(family: str, cp: int, tp: int, pp: int, dp: int, folder: Path) -> None:
    cfg = tiny_config(
        folder, family, STEPS, context_parallel_size=cp, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, sequence_parallel=tp > 1,
    )  # fmt: skip
    for of_rank in run_ranks(steps_of, cfg, cp=cp, tp=tp, pp=pp, dp=dp):
        assert_same_training(of_rank, reference(family, folder))
