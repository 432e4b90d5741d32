"""The table of names goes both ways without losing a bit, and refuses what no class can compute."""

from dataclasses import replace

import pytest
import torch

from megapoly.config import load_config, preset_names
from megapoly.errors import CheckpointError, ConfigError
from megapoly.hf.names import from_hf, hf_family, table, to_hf
from megapoly.sections import ModelConfig

GPT2 = ModelConfig(num_layers=2, hidden_size=24, num_attention_heads=3, seq_length=8)
NEOX = replace(GPT2, position_embedding_type="rope", untie_embeddings_and_output_weights=True)
LLAMA = replace(
    NEOX, normalization="RMSNorm", activation="swiglu", add_bias_linear=False, num_attention_heads=4, num_query_groups=2
)
ONE_GROUP = replace(LLAMA, num_query_groups=1, kv_channels=10)
VOCAB = 37


def random_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {row.name: tuple(VOCAB if size == -1 else size for size in row.shape) for row in table(model)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("model", [GPT2, NEOX, LLAMA, ONE_GROUP], ids=["gpt2", "gpt_neox", "llama", "llama-one-group"])
def test_round_trip_is_bit_exact(model: ModelConfig) -> None:
    ours = random_tensors(model)
    theirs = dict(to_hf(model, ours, ours.__getitem__))
    back = dict(from_hf(model, VOCAB, theirs.__getitem__))
    assert list(back) == list(ours)
    for name, tensor in ours.items():
        assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32)), name
    again = dict(to_hf(model, back, back.__getitem__))
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())


def test_every_preset_has_its_family() -> None:
    families = {name: hf_family(load_config(name).model) for name in preset_names()}
    expected = {"polylm": "gpt2", "tiny": "gpt2", "polyglot": "gpt_neox"}
    expected |= dict.fromkeys(("gecko", "42dot", "exaone", "hyperclova"), "llama")
    for name, family in families.items():
        wanted = "gpt_neox" if name.endswith("-rope") else expected[name.split("-")[0]]
        assert family == wanted, name


@pytest.mark.parametrize(
    ("model", "option"),
    [
        (replace(GPT2, position_embedding_type="none"), "position_embedding_type"),
        (replace(GPT2, normalization="RMSNorm"), "normalization"),
        (replace(GPT2, activation="geglu"), "activation"),
        (replace(GPT2, add_bias_linear=False), "add_bias_linear"),
        (replace(GPT2, parallel_residual=True), "parallel_residual"),
        (replace(GPT2, num_query_groups=1), "num_query_groups"),
        (replace(GPT2, kv_channels=16), "kv_channels"),
        (replace(NEOX, activation="swiglu"), "activation"),
        (replace(NEOX, add_bias_linear=False), "add_bias_linear"),
        (replace(NEOX, num_query_groups=1), "num_query_groups"),
        (replace(NEOX, kv_channels=16), "kv_channels"),
        (replace(LLAMA, activation="geglu"), "activation"),
        (replace(LLAMA, add_bias_linear=True), "add_bias_linear"),
        (replace(LLAMA, parallel_residual=True), "parallel_residual"),
        (replace(LLAMA, rotary_percent=0.5, kv_channels=8), "rotary_percent"),
        (replace(LLAMA, hidden_size=30, kv_channels=8), "hidden_size"),
    ],
)
def test_an_option_that_no_class_computes_is_named(model: ModelConfig, option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option} .*cannot be exported") as caught:
        hf_family(model)
    assert "\n" not in str(caught.value)


def test_a_missing_unknown_or_misshapen_parameter_is_named() -> None:
    ours = random_tensors(LLAMA)
    fewer = [name for name in ours if name != "layers.1.mlp.down.weight"]
    with pytest.raises(CheckpointError, match=r"lacks parameter 'layers\.1\.mlp\.down\.weight'"):
        list(to_hf(LLAMA, fewer, ours.__getitem__))
    with pytest.raises(CheckpointError, match=r"unknown parameter '\.\./\.\./x'"):
        list(to_hf(LLAMA, [*ours, "../../x"], ours.__getitem__))
    theirs = dict(to_hf(LLAMA, ours, ours.__getitem__))
    ours["layers.0.attention.qkv.weight"] = ours["layers.0.attention.qkv.weight"].transpose(0, 1)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.qkv\.weight' has shape \[4, 2, 6, 24\]"):
        list(to_hf(LLAMA, ours, ours.__getitem__))
    # 2 groups of 4 heads: the key projection must have half the rows of the query projection.
    theirs["model.layers.0.self_attn.k_proj.weight"] = theirs["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match=r"k_proj\.weight' has shape \[24, 24\], its config asks for \[12, 24\]"):
        list(from_hf(LLAMA, VOCAB, theirs.__getitem__))
