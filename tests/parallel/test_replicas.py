"""The guard against silent corruption: it notices any one bit, names the rank, and is silent where all is well."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from tiny_runs import tiny_config, tiny_run

from megapoly.errors import Echo, ReplicaError
from megapoly.parallel import replicas
from megapoly.parallel.mesh import Mesh
from megapoly.parallel.replicas import check_replicas, hash_bits
from megapoly.sections import Config
from megapoly.train.step import train_step


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_a_hash_changes_with_any_one_bit(size: int, chunk: int, dtype: torch.dtype, data: st.DataObject) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "CHUNK", chunk)
        before = hash_bits(x)
        assert before == hash_bits(x.clone())
        flip(x, data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 8 * x.element_size() - 1)))
        assert hash_bits(x) != before


def flip(x: torch.Tensor, place: int, bit: int) -> None:
    """Flip one bit of one entry."""
    x.view(torch.uint8)[place * x.element_size() + bit // 8] ^= 1 << bit % 8


def outcome(mesh: Mesh, cfg: Config, rank: int, name: str, place: int, bit: int) -> str:
    """What the guard says, after two steps with a look after each, when one rank has one wrong bit."""
    run = tiny_run(mesh, cfg)
    for step in (1, 2):
        train_step(run, step)
        check_replicas(run.buffers, step)
    for segment in run.buffers.segments:
        if mesh.world.rank == rank and segment.name == name:
            flip(run.buffers.params[segment.begin : segment.end], place, bit)
    try:
        check_replicas(run.buffers, 2)
    except (ReplicaError, Echo) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


KEY = "layers.0.attention.qkv.weight"
MLP, NORM, WORD = "layers.1.mlp.down.weight", "layers.2.mlp_norm.weight", "embedding.word.weight"


@pytest.mark.parametrize(
    ("layout", "rank", "name", "bit", "said"),
    [
        ({"dp": 3}, 1, MLP, 0, "rank 1 differs from most of the 3 ranks that hold the same in the bits of '" + MLP + "'"),
        ({"dp": 4, "instances": 2}, 3, NORM, 15, "rank 3 differs from most of the 4 ranks that hold the same in the bits"),
        ({"dp": 2}, 1, MLP, 7, "ranks 0, 1 differ from each other in the bits of '" + MLP + "'"),
        ({"tp": 2, "pp": 2}, 3, NORM, 3, "ranks 2, 3 differ from each other in the bits of '" + NORM + "'"),
        ({"pp": 2, "dp": 1}, 1, WORD, 3, "ranks 0, 1 differ from each other in the bits of '" + WORD + "'"),
        ({"tp": 4, "kv": 2}, 2, KEY, 1, "ranks 2, 3 differ from each other in the bits of '" + KEY + "'"),
        (
            {"pp": 2, "dp": 3, "shares_vocab": True}, 4, WORD, 9,
            "rank 4 differs from most of the 3 ranks that hold the same in the bits of '" + WORD + "'",
        ),
        ({"tp": 2, "pp": 2, "shares_vocab": True}, -1, WORD, 0, ""),
        ({"tp": 4, "kv": 2}, -1, MLP, 0, ""),
        ({"tp": 2, "dp": 2}, -1, MLP, 0, ""),
    ],
)  # fmt: skip
def test_the_rank_with_one_wrong_bit_is_named(
    layout: dict[str, int], rank: int, name: str, bit: int, said: str, tmp_path: Path
) -> None:
    cfg = tiny_config(
        tmp_path, "gpt2", bf16=True, ddp_bucket_size=40_000, tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1), global_batch_size=12, num_attention_heads=8,
        num_distributed_optimizer_instances=layout.get("instances", 1),
        pipeline_vocab_parallel=layout.get("shares_vocab", False),
    )  # fmt: skip
    outcomes = run_ranks(outcome, cfg, rank, name, 5, bit, **layout)
    if not said:
        assert set(outcomes) == {"nothing"}
        return
    spoken = [line for line in outcomes if line.startswith("ReplicaError: ")]
    assert len(spoken) == 1 and f"after step 2 {said}" in spoken[0] and "\n" not in spoken[0]
    assert len([line for line in outcomes if line.startswith("Echo: ")]) == len(outcomes) - 1
