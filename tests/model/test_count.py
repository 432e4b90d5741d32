"""Parameter counts of the published models, from the modules themselves on the meta device."""

import math

import pytest
import torch
from megapoly_kernels import choose

from megapoly.checks import padded_vocab_size
from megapoly.config import load_config
from megapoly.model.count import flops_per_token, num_parameters, parameter_shapes
from megapoly.model.transformer import Transformer
from megapoly.parallel.mesh import Axis
from megapoly.parallel.stage import Stage
from megapoly.parallel.tensor import Placement, sharded_parameters

COUNTS = {
    "polylm-1.7b": 1_737_084_928,
    "polylm-13b": 13_906_790_400,
    "polyglot-ko-1.3b": 1_331_810_304,
    "polyglot-ko-3.8b": 3_809_974_272,
    "polyglot-ko-5.8b": 5_885_059_072,
    "polyglot-ko-12.8b": 12_893_603_840,
    "gecko-7b": 6_738_415_616,
    "42dot-1.3b": 1_439_270_912,
    # Learned positions are 2,048 rows of the hidden size; rotary ones are none.
    "polylm-1.7b-rope": 1_737_084_928 - 2048 * 2048,
    "polylm-13b-rope": 13_906_790_400 - 2048 * 5120,
}


def build(name: str, tp: Axis) -> Transformer:
    cfg = load_config(name)
    stage = Stage(0, cfg.model.num_layers, has_embedding=True, has_head=True)
    assert cfg.tokenizer.vocab_size is not None
    place = Placement(tp, sequence_parallel=False, dtype=torch.bfloat16, device=torch.device("meta"))
    return Transformer(cfg, cfg.tokenizer.vocab_size, stage, place, choose({}, torch.device("cpu")))


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name: str) -> None:
    cfg = load_config(name)
    assert cfg.tokenizer.vocab_size is not None
    shapes = {n: shard.shape for n, _, (shard,) in sharded_parameters(build(name, Axis("tp")))}
    assert sum(math.prod(shape) for shape in shapes.values()) == COUNTS[name]
    assert num_parameters(cfg.model, cfg.tokenizer.vocab_size) == COUNTS[name]
    assert dict(parameter_shapes(cfg.model, cfg.tokenizer.vocab_size)) == shapes


@pytest.mark.parametrize("name", ["polylm-13b", "polyglot-ko-12.8b", "gecko-7b"])
def test_shards_of_eight_ranks_make_up_the_whole(name: str) -> None:
    held = sum(
        shard.end - shard.begin if shard.dim is not None else int(rank == 0)
        for rank in range(8)
        for n, _, (shard,) in sharded_parameters(build(name, Axis("tp", rank, 8)))
        if n == "embedding.word.weight" or n == "layers.0.mlp.down.bias"
    )
    cfg = load_config(name)
    has_bias = cfg.model.add_bias_linear
    assert held == cfg.tokenizer.vocab_size + has_bias
    local = build(name, Axis("tp", 7, 8)).embedding["word"].weight.shape[0]
    assert local * 8 == padded_vocab_size(cfg.tokenizer.vocab_size, 128, 8)


def test_flops_of_polylm() -> None:
    # 88.4 and 11.6 GFLOP a token, forward and backward, attention over the whole sequence.
    assert round(flops_per_token(load_config("polylm-13b").model, 256_000) / 1e9, 1) == 88.4
    assert round(flops_per_token(load_config("polylm-1.7b").model, 256_000) / 1e9, 1) == 11.6
