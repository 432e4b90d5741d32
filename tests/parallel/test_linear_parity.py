"""Training on layouts that only tensor parallelism of its own kind knows: shared key/value heads, overlap by chunks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_parity import STEPS, assert_same_training, steps_of
from tiny_runs import VOCAB, tiny_config, tiny_run, whole_state

from megapoly.checkpoint.load import CheckpointReader, load_checkpoint
from megapoly.hf.export import export
from megapoly.parallel.collectives import all_gather
from megapoly.parallel.mesh import Mesh
from megapoly.parallel.tensor import shard_of, sharded_parameters
from megapoly.sections import Config
from megapoly.train.loop import train
from megapoly.train.setup import Run
from megapoly.train.step import train_step

# Eight query heads on two key/value heads, so that four ranks hold two queries each and a copy of a key and a value.
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_query_groups": 2}


def config(folder: Path, family: str, **leaves: Any) -> Config:
    # At 1e-3 this LLaMA's gradient norms jump to 10, and two plain tensor-parallel ranks are 1.2e-5 off one process.
    return tiny_config(folder, family, STEPS, lr=3e-4, **(HEADS | leaves))


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


def require_equal_copies(run: Run) -> None:
    shards = 0
    run.buffers.wait_params()
    for _, parameter, (*_, last) in sharded_parameters(*run.chunks):
        if last.is_copied:
            copies = all_gather(last.held(parameter).detach()[None], run.mesh.kv)
            assert len(copies) == 2 and copies[0].any() and torch.equal(copies[0], copies[1])
            shards += 1
    assert shards == 2 * run.cfg.model.num_layers  # weights and biases


def trained(mesh: Mesh, cfg: Config) -> dict[str, torch.Tensor]:
    """The state after the steps of cfg, which are saved."""
    run = tiny_run(mesh, cfg)
    train(run)
    if mesh.kv.size > 1:
        require_equal_copies(run)
    return whole_state(run)


def loaded(mesh: Mesh, cfg: Config) -> dict[str, torch.Tensor]:
    """The state right after it is loaded; one more step must leave the copies equal, their moments with them."""
    run = tiny_run(mesh, cfg)
    load_checkpoint(CheckpointReader.open(cfg.logging.run_dir), run.optimizer)
    state = {name: tensor.clone() for name, tensor in whole_state(run).items()}
    if mesh.kv.size > 1:
        require_equal_copies(run)
        train_step(run, 1)
        require_equal_copies(run)
    return state


@pytest.mark.parametrize(("saves", "loads"), [((4, 2), [(4, 1), (1, 1), (2, 2)]), ((2, 1), [(4, 2)])])
def test_shared_heads_are_saved_once_and_loaded_on_any_layout(
    saves: tuple[int, int], loads: list[tuple[int, int]], tmp_path: Path
) -> None:
    def run(fn: Any, tp: int, dp: int) -> list[dict[str, torch.Tensor]]:
        cfg = tiny_config(tmp_path, "gpt2", 2, tensor_model_parallel_size=tp, **HEADS)
        return run_ranks(fn, cfg, tp=tp, dp=dp, kv=max(tp // 2, 1))

    expected = run(trained, *saves)[0]
    assert expected["model.layers.0.attention.qkv.weight"].shape == (2, 6, 18, 144)
    for layout in loads:
        for of_rank in run(loaded, *layout):
            assert of_rank.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(of_rank[name], tensor), f"{name} on {layout}"


# With 512 the third rank holds nothing but padding, with 1 it holds two rows of it.
@pytest.mark.parametrize("divisible_by", [1, 512])
def test_an_odd_vocabulary_on_three_ranks_is_padded_for_training_alone(divisible_by: int, tmp_path: Path) -> None:
    # At 1e-3 one gradient norm of twenty is 1.1e-5 off.
    odd = {"num_query_groups": 1, "ffn_hidden_size": 201, "make_vocab_size_divisible_by": divisible_by, "lr": 3e-4}
    layout = {"tensor_model_parallel_size": 3, "run_dir": str(tmp_path / "three")}
    alone = run_ranks(steps_of, tiny_config(tmp_path, "llama", STEPS, **odd))[0]
    for of_rank in run_ranks(steps_of, tiny_config(tmp_path, "llama", STEPS, **odd, **layout), tp=3, kv=3):
        assert_same_training(of_rank, alone)
    run_ranks(trained_with_padding, tiny_config(tmp_path, "llama", 2, **odd, **layout), tp=3, kv=3)
    reader = CheckpointReader.open(tmp_path / "three")
    assert reader.get("head.weight").shape == reader.get("embedding.word.weight").shape == (VOCAB, 144)
    exported = load_file(export(reader, tmp_path / "hf") / "model.safetensors")
    assert exported["lm_head.weight"].shape == exported["model.embed_tokens.weight"].shape == (VOCAB, 144)


def trained_with_padding(mesh: Mesh, cfg: Config) -> None:
    run = tiny_run(mesh, cfg)
    train(run)
    (chunk,) = run.chunks
    weight, shard = chunk.head_weight, shard_of(chunk.head_weight)
    assert len(weight) * 3 == {1: 1005, 512: 1536}[cfg.tokenizer.make_vocab_size_divisible_by]
    assert not weight[shard.end - shard.begin :].any(), "padding has been trained"
