"""Initial weights: the same on every layout, drawn from (seed, parameter name)."""

import math

import torch

from megapoly.model.head import SharedHead
from megapoly.model.transformer import Transformer
from megapoly.parallel.rng import normal_shard
from megapoly.parallel.tensor import Shard, sharded_parameters
from megapoly.sections import ModelConfig


def _std(m: ModelConfig, shard: Shard) -> float:
    if m.init_method == "xavier_normal":
        # Glorot and Bengio 2010; fan-out counts every output dimension of a packed matrix.
        return math.sqrt(2.0 / (shard.shape[-1] + math.prod(shard.shape[:-1])))
    if shard.init == "output_normal" and m.scaled_output_init:
        return m.init_method_std / math.sqrt(2.0 * m.num_layers)
    return m.init_method_std


@torch.no_grad()
def initialize(model: Transformer | SharedHead, seed: int) -> None:
    """Fill every parameter: matrices N(0, std), norms 1, biases 0, padding rows 0."""
    for name, parameter, shard in sharded_parameters(model):
        if shard.init == "ones":
            parameter.fill_(1.0)
            continue
        parameter.zero_()
        if shard.init == "zeros":
            continue
        drawn = normal_shard(shard.shape, _std(model.m, shard), seed, name, shard.dim, shard.begin, shard.end)
        held = parameter if shard.dim is None else parameter.narrow(shard.dim, 0, shard.end - shard.begin)
        held.copy_(drawn)
