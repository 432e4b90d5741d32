"""One two-way table between megapoly's parameters and those of GPT2, GPTNeoX and Llama `ForCausalLM`.

V vocabulary, P positions, H hidden, F inner width of the MLP, G key/value heads, N query heads of each, K channels of a
head. Query head h = g * N + n; `attention.qkv` holds, for each group, N queries, then a key and a value.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megapoly.errors import CheckpointError, ConfigError
from megapoly.sections import ModelConfig

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM"}
VOCABULARY = -1  # stands in a shape for the number of rows that the vocabulary gives


def hf_family(model: ModelConfig) -> str:
    """Say which of `gpt2`, `gpt_neox` and `llama` computes exactly what these options do.

    Raises ConfigError that names the first option which the nearest class cannot express.
    """
    if model.position_embedding_type == "none":
        raise ConfigError("position_embedding_type (none) cannot be exported: use learned_absolute (GPT-2) or rope")
    if model.position_embedding_type == "learned_absolute":
        family = "gpt2"
    else:
        family = "llama" if model.normalization == "RMSNorm" else "gpt_neox"
    heads, llama = model.num_attention_heads, family == "llama"
    activations = ("swiglu",) if llama else ("gelu_tanh", "gelu")
    head_dim_is_free = llama or model.head_dim * heads == model.hidden_size
    for option, value, fits, needed in (
        ("normalization", model.normalization, llama or model.normalization == "LayerNorm", "LayerNorm"),
        ("activation", model.activation, model.activation in activations, " or ".join(activations)),
        ("add_bias_linear", model.add_bias_linear, model.add_bias_linear != llama, str(not llama).lower()),
        ("parallel_residual", True, family == "gpt_neox" or not model.parallel_residual, "false"),
        ("rotary_percent", model.rotary_percent, not llama or model.rotary_dim == model.head_dim, "1.0"),
        (
            "num_query_groups",
            model.num_kv_heads,
            llama or model.num_kv_heads == heads,
            f"num_attention_heads ({heads})",
        ),
        ("kv_channels", model.head_dim, head_dim_is_free, f"hidden_size / heads ({model.hidden_size} / {heads})"),
        ("hidden_size", model.hidden_size, model.hidden_size % heads == 0, f"a multiple of the heads ({heads})"),
    ):
        if not fits:
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ConfigError(f"{option} ({shown}) cannot be exported: {ARCHITECTURES[family]} needs {needed}")
    return family


# ------------------------------------------------------------------------------- transforms and their inverses


@dataclass(frozen=True)
class Transform:
    """A bijection between one megapoly tensor and the tensors that the other class keeps instead."""

    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


def _split_qkv(t: Tensor, m: ModelConfig) -> tuple[Tensor, ...]:
    queries = t.shape[1] - 2
    return tuple(part.flatten(0, 2) for part in t.split([queries, 1, 1], dim=1))


def _join_qkv(parts: tuple[Tensor, ...], m: ModelConfig) -> Tensor:
    return torch.cat([part.reshape(m.num_kv_heads, -1, m.head_dim, part.shape[-1]) for part in parts], dim=1)


SAME = Transform(lambda t, m: (t,), lambda parts, m: parts[0])
CONV1D = Transform(lambda t, m: (t.t(),), lambda parts, m: parts[0].t())
# Conv1D keeps [in, out], and in GPT-2 all queries come before all keys and all values: [H, 3 G K] from [G, 3, K, H].
CONV1D_QKV = Transform(
    lambda t, m: (t.permute(3, 1, 0, 2).flatten(1),),
    lambda parts, m: parts[0].reshape(-1, 3, m.num_kv_heads, m.head_dim).permute(2, 1, 3, 0),
)
CONV1D_QKV_BIAS = Transform(
    lambda t, m: (t.transpose(0, 1).flatten(),),
    lambda parts, m: parts[0].reshape(3, m.num_kv_heads, m.head_dim).transpose(0, 1),
)
# GPT-NeoX views the rows of query_key_value as [heads, 3, K]: megapoly's order with one query in a group.
HEADWISE_QKV = Transform(
    lambda t, m: (t.flatten(0, 2),),
    lambda parts, m: parts[0].reshape(m.num_kv_heads, 3, m.head_dim, *parts[0].shape[1:]),
)
SEPARATE_QKV = Transform(_split_qkv, _join_qkv)
GATE_AND_UP = Transform(lambda t, m: (t[0], t[1]), lambda parts, m: torch.stack(parts))


# ------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One parameter of megapoly with its shape (VOCABULARY for V) and its names and form in the other class."""

    name: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    transform: Transform


_Pattern = tuple[str, tuple[str, ...], Transform]


def _module(ours: str, theirs: str, transform: Transform = SAME, bias: Transform | None = SAME) -> list[_Pattern]:
    rows: list[_Pattern] = [(f"{ours}.weight", (f"{theirs}.weight",), transform)]
    return rows if bias is None else [*rows, (f"{ours}.bias", (f"{theirs}.bias",), bias)]


_GPT2: list[_Pattern] = [
    *_module("embedding.word", "transformer.wte", bias=None),
    *_module("embedding.position", "transformer.wpe", bias=None),
    *_module("layers.{i}.attention_norm", "transformer.h.{i}.ln_1"),
    *_module("layers.{i}.attention.qkv", "transformer.h.{i}.attn.c_attn", CONV1D_QKV, CONV1D_QKV_BIAS),
    *_module("layers.{i}.attention.output", "transformer.h.{i}.attn.c_proj", CONV1D),
    *_module("layers.{i}.mlp_norm", "transformer.h.{i}.ln_2"),
    *_module("layers.{i}.mlp.up", "transformer.h.{i}.mlp.c_fc", CONV1D),
    *_module("layers.{i}.mlp.down", "transformer.h.{i}.mlp.c_proj", CONV1D),
    *_module("final_norm", "transformer.ln_f"),
    *_module("head", "lm_head", bias=None),
]
_GPT_NEOX: list[_Pattern] = [
    *_module("embedding.word", "gpt_neox.embed_in", bias=None),
    *_module("layers.{i}.attention_norm", "gpt_neox.layers.{i}.input_layernorm"),
    *_module("layers.{i}.attention.qkv", "gpt_neox.layers.{i}.attention.query_key_value", HEADWISE_QKV, HEADWISE_QKV),
    *_module("layers.{i}.attention.output", "gpt_neox.layers.{i}.attention.dense"),
    *_module("layers.{i}.mlp_norm", "gpt_neox.layers.{i}.post_attention_layernorm"),
    *_module("layers.{i}.mlp.up", "gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
    *_module("layers.{i}.mlp.down", "gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
    *_module("final_norm", "gpt_neox.final_layer_norm"),
    *_module("head", "embed_out", bias=None),
]
_LLAMA: list[_Pattern] = [
    *_module("embedding.word", "model.embed_tokens", bias=None),
    *_module("layers.{i}.attention_norm", "model.layers.{i}.input_layernorm", bias=None),
    (
        "layers.{i}.attention.qkv.weight",
        tuple(f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
        SEPARATE_QKV,
    ),
    *_module("layers.{i}.attention.output", "model.layers.{i}.self_attn.o_proj", bias=None),
    *_module("layers.{i}.mlp_norm", "model.layers.{i}.post_attention_layernorm", bias=None),
    (
        "layers.{i}.mlp.up.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        GATE_AND_UP,
    ),
    *_module("layers.{i}.mlp.down", "model.layers.{i}.mlp.down_proj", bias=None),
    *_module("final_norm", "model.norm", bias=None),
    *_module("head", "lm_head", bias=None),
]
_PATTERNS = {"gpt2": _GPT2, "gpt_neox": _GPT_NEOX, "llama": _LLAMA}


def _shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner, groups, head_dim = m.hidden_size, m.ffn_size, m.num_kv_heads, m.head_dim
    per_group = m.num_attention_heads // groups + 2
    up = (2, inner) if m.is_gated else (inner,)
    return {
        "embedding.word.weight": (VOCABULARY, hidden),
        "embedding.position.weight": (m.max_positions, hidden),
        "layers.{i}.attention.qkv.weight": (groups, per_group, head_dim, hidden),
        "layers.{i}.attention.qkv.bias": (groups, per_group, head_dim),
        "layers.{i}.attention.output.weight": (hidden, m.num_attention_heads * head_dim),
        "layers.{i}.mlp.up.weight": (*up, hidden),
        "layers.{i}.mlp.up.bias": up,
        "layers.{i}.mlp.down.weight": (hidden, inner),
        "head.weight": (VOCABULARY, hidden),
    }


def table(model: ModelConfig) -> list[Row]:
    """List the parameters of a model from the embedding to the head, each with its form in the other class."""
    shapes = _shapes(model)
    patterns = [p for p in _PATTERNS[hf_family(model)] if not (p[0] == "head.weight" and model.tied)]

    def row(pattern: _Pattern, layer: int) -> Row:
        name, theirs, transform = pattern
        shape = shapes.get(name, (model.hidden_size,))
        return Row(name.format(i=layer), shape, tuple(n.format(i=layer) for n in theirs), transform)

    inside = [p for p in patterns if "{i}" in p[0]]
    first, last = patterns.index(inside[0]), patterns.index(inside[-1])
    return [
        *(row(p, 0) for p in patterns[:first]),
        *(row(p, i) for i in range(model.num_layers) for p in inside),
        *(row(p, 0) for p in patterns[last + 1 :]),
    ]


# ------------------------------------------------------------------------------------------- both directions


def to_hf(model: ModelConfig, names: Iterable[str], get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the other class, reading one parameter after the other through `get`.

    `names` are the parameters that exist; a missing, unknown or misshapen one raises CheckpointError.
    """
    rows = table(model)
    known, given = {row.name for row in rows}, set(names)
    for odd, what in ((known - given, "lacks"), (given - known, "holds an unknown")):
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise CheckpointError(
                f"checkpoint {what} parameter '{min(odd)}'{more}: it is not of the model in its config"
            )
    for row in rows:
        tensor = get(row.name)
        _require_shape(row.name, tensor, row.shape)
        yield from zip(row.hf_names, row.transform.split(tensor, model), strict=True)


def from_hf(model: ModelConfig, vocab_size: int, get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of megapoly in the order of `table`, reading the other class's tensors through `get`.

    The exact inverse of `to_hf`; a tensor of another shape than the config asks for raises CheckpointError.
    """
    for row in table(model):
        shape = tuple(vocab_size if size == VOCABULARY else size for size in row.shape)
        expected = row.transform.split(torch.empty(shape, device="meta"), model)
        parts = tuple(get(name) for name in row.hf_names)
        for name, part, like in zip(row.hf_names, parts, expected, strict=True):
            _require_shape(name, part, tuple(like.shape))
        yield row.name, row.transform.join(parts, model).contiguous()


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    fits = len(shape) == tensor.dim() and all(
        want in (VOCABULARY, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ["vocabulary" if size == VOCABULARY else size for size in shape]
        raise CheckpointError(f"parameter '{name}' has shape {list(tensor.shape)}, its config asks for {wanted}")
