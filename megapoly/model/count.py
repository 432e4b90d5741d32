"""Counts in closed form: parameters, FLOPs, and the costs by which layers are split over stages."""

import math
from collections.abc import Iterator

from megapoly.sections import ModelConfig


def parameter_shapes(m: ModelConfig, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, whole shape) of every parameter of a model, without building it; a tied head is not a parameter."""
    h, f, groups = m.hidden_size, m.ffn_size, m.num_kv_heads
    packed = (groups, m.num_attention_heads // groups + 2, m.head_dim)
    up = (2, f) if m.is_gated else (f,)
    yield "embedding.word.weight", (vocab_size, h)
    if m.position_embedding_type == "learned_absolute":
        yield "embedding.position.weight", (m.max_positions, h)

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (h,)
        if m.normalization == "LayerNorm":
            yield f"{name}.bias", (h,)

    def linear(name: str, out: tuple[int, ...], inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (*out, inner)
        if m.add_bias_linear:
            yield f"{name}.bias", out

    for i in range(m.num_layers):
        yield from norm(f"layers.{i}.attention_norm")
        yield from linear(f"layers.{i}.attention.qkv", packed, h)
        yield from linear(f"layers.{i}.attention.output", (h,), m.num_attention_heads * m.head_dim)
        yield from norm(f"layers.{i}.mlp_norm")
        yield from linear(f"layers.{i}.mlp.up", up, h)
        yield from linear(f"layers.{i}.mlp.down", (h,), f)
    yield from norm("final_norm")
    if not m.tied:
        yield "head.weight", (vocab_size, h)


def num_parameters(m: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model, a tied matrix once."""
    return sum(math.prod(shape) for _, shape in parameter_shapes(m, vocab_size))


def layer_flops(m: ModelConfig) -> int:
    """Forward FLOPs of one block for one token: 2 a multiply-add; attention over the whole sequence (PaLM's count)."""
    heads = m.num_attention_heads * m.head_dim
    qkv = heads + 2 * m.num_kv_heads * m.head_dim
    mlp = (3 if m.is_gated else 2) * m.ffn_size
    return 2 * m.hidden_size * (qkv + heads + mlp) + 4 * m.seq_length * heads


def head_flops(m: ModelConfig, vocab_size: int) -> int:
    """Forward FLOPs of the output matrix for one token."""
    return 2 * m.hidden_size * vocab_size


def flops_per_token(m: ModelConfig, vocab_size: int) -> int:
    """FLOPs of forward and backward for one token, as MFU counts them: three times the forward, no recomputation.

    Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: 6 N + 12 L H Q T, with N the matrices' entries.
    """
    return 3 * (m.num_layers * layer_flops(m) + head_flops(m, vocab_size))
