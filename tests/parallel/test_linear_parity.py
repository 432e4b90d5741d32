"""Training on layouts that only tensor parallelism of its own kind knows: shared key/value heads, overlap by chunks."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from test_parity import STEPS, assert_same_training, steps_of
from tiny_runs import tiny_config

from megapoly.sections import Config

# Eight query heads on two key/value heads, so that four ranks hold two queries each and a copy of a key and a value.
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_query_groups": 2}


def config(folder: Path, family: str, **leaves: Any) -> Config:
    return tiny_config(folder, family, STEPS, **(HEADS | leaves))


@pytest.mark.parametrize(
    ("family", "pp", "dp", "leaves"),
    [
        ("gpt2", 1, 1, {}),
        ("llama", 1, 2, {"sequence_parallel": True, "tp_comm_overlap": True}),
        ("gpt_neox", 2, 1, {"sequence_parallel": True}),
    ],
)
def test_ranks_that_share_key_value_heads_train_like_one_process(
    family: str, pp: int, dp: int, leaves: dict[str, Any], tmp_path: Path
) -> None:
    alone = run_ranks(steps_of, config(tmp_path, family))[0]
    layout = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": pp}
    for of_rank in run_ranks(steps_of, config(tmp_path, family, **layout, **leaves), tp=4, kv=2, pp=pp, dp=dp):
        assert_same_training(of_rank, alone)
