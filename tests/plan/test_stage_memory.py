"""Memory of a curriculum: that of the stage that holds the most, with its own sequences and batches."""

import dataclasses
import re
from typing import Any

import pytest

from megapoly.config import load_config
from megapoly.plan.memory import describe_memory
from megapoly.sections import Config, Stage

VOCAB = 4096


def told(stages: list[dict[str, Any]], **leaves: Any) -> str:
    cfg: Config = load_config("tiny", {"max_position_embeddings": 1024, "global_batch_size": 8} | leaves)
    made = [Stage(name=f"s{i}", tokens=10_000, non_english_share=0.3, **stage) for i, stage in enumerate(stages)]
    cfg = dataclasses.replace(cfg, curriculum=dataclasses.replace(cfg.curriculum, stages=made))
    pp = cfg.parallel.pipeline_model_parallel_size
    return describe_memory(cfg, VOCAB, (4 // pp,) * pp, 2 * pp)


@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_sequences_of_any_stage_decide(order: int) -> None:
    stages = [{}, {"seq_length": 512}, {"seq_length": 64}][::order]
    assert told(stages).replace(" in stage 's1' with sequences of 512", "") == told([{}], seq_length=512)
    assert "in stage 's1' with sequences of 512" in told(stages)


def test_a_stage_with_larger_batches_has_more_of_them_in_flight() -> None:
    """GPipe keeps what all micro-batches of a step need, so that a stage's own batch decides."""
    layout = {"pipeline_model_parallel_size": 2, "pipeline_schedule": "gpipe"}
    assert "in stage 's1' with sequences of 128" in told([{}, {"global_batch_size": 32}], **layout)
    plain = told([{}], **layout | {"global_batch_size": 32})
    assert told([{}, {"global_batch_size": 32}], **layout).replace(" in stage 's1' with sequences of 128", "") == plain


def test_stages_that_are_alike_are_not_named() -> None:
    assert "stage" not in told([{}, {"seq_length": 128}])
    assert re.search(r"activations \d", told([{}]))
