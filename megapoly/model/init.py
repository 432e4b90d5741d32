"""Initial weights: the same on every layout, drawn from (seed, parameter name)."""

import math

import torch

from megapoly.model.head import SharedHead
from megapoly.model.transformer import Transformer
from megapoly.parallel.rng import normal_shard
from megapoly.parallel.tensor import Shard, sharded_parameters
from megapoly.sections import ModelConfig


def _std(m: ModelConfig, name: str, shard: Shard) -> float:
    """In muP the variance of what the blocks multiply with falls with the width (Yang et al. 2022, table 8)."""
    if m.init_method == "xavier_normal":
        # Glorot and Bengio 2010; fan-out counts every output dimension of a packed matrix.
        return math.sqrt(2.0 / (shard.shape[-1] + math.prod(shard.shape[:-1])))
    std = m.init_method_std / math.sqrt(m.width_multiple) if name.startswith("layers.") else m.init_method_std
    return std / math.sqrt(2.0 * m.num_layers) if shard.init == "output_normal" and m.scaled_output_init else std


@torch.no_grad()
def initialize(model: Transformer | SharedHead, seed: int) -> None:
    """Fill every parameter: matrices N(0, std), norms 1, biases 0, padding rows 0."""
    for name, parameter, shards in sharded_parameters(model):
        parameter.fill_(1.0 if shards[0].init == "ones" else 0.0)
        for shard in shards:
            if shard.init not in ("ones", "zeros"):
                std = _std(model.m, name, shard)
                shard.held(parameter).copy_(normal_shard(shard.shape, std, seed, name, shard.offsets, shard.sizes))
