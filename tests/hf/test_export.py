"""An export loads in transformers without a missing key and computes what megapoly computes."""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megapoly_kernels import choose
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megapoly.errors import CheckpointError, ConfigError
from megapoly.hf.export import MANIFEST, Reader, export, hf_config
from megapoly.hf.names import hf_family, table
from megapoly.model.transformer import Transformer
from megapoly.parallel.mesh import Axis
from megapoly.parallel.stage import Stage
from megapoly.parallel.tensor import Placement
from megapoly.sections import Config, ModelConfig, TokenizerConfig

ROOT = Path(__file__).parents[2]
VOCAB = 101  # odd and prime: padding to any multiple would show
# Values off every default, so that a field of config.json that is not written shows in the logits.
BASE = ModelConfig(
    num_layers=2, hidden_size=48, num_attention_heads=4, ffn_hidden_size=80, seq_length=32, norm_epsilon=3e-3
)
ROPE = replace(BASE, position_embedding_type="rope", rotary_base=321.0)
LLAMA = replace(ROPE, normalization="RMSNorm", activation="swiglu", add_bias_linear=False, num_query_groups=2)
UNTIED: dict[str, Any] = {"untie_embeddings_and_output_weights": True}
CASES = {
    "gpt2-tied": BASE,
    "gpt2-untied-erf": replace(BASE, activation="gelu", **UNTIED),
    "neox-parallel": replace(ROPE, parallel_residual=True, rotary_percent=0.5, activation="gelu", **UNTIED),
    "neox-head-dim-256": replace(
        ROPE, hidden_size=512, num_attention_heads=2, rotary_percent=0.25, parallel_residual=True, **UNTIED
    ),
    "neox-sequential-tied": ROPE,
    "llama-gqa": replace(LLAMA, **UNTIED),
    "llama-tied-free-head-dim": replace(LLAMA, kv_channels=20, num_query_groups=1),
}


@dataclass
class MemoryReader:
    """A checkpoint in memory, with the interface of megapoly.checkpoint.load.CheckpointReader."""

    config: Config
    vocab_size: int
    tensors: dict[str, Tensor]
    tokenizer_path: Path | None = None
    step: int = 7

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def random_parameters(model: ModelConfig, vocab_size: int = VOCAB) -> dict[str, Tensor]:
    """Global tensors that no symmetry hides: biases and norm weights are random too."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for row in table(model):
        shape = tuple(vocab_size if size == -1 else size for size in row.shape)
        drawn = torch.randn(shape, generator=generator)
        is_vector = row.name.endswith("bias") or "norm" in row.name
        tensors[row.name] = 0.3 * drawn + ("norm.weight" in row.name) if is_vector else drawn / math.sqrt(shape[-1])
    return tensors


def make_reader(
    model: ModelConfig,
    tensors: dict[str, Tensor],
    vocab_size: int = VOCAB,
    tokenizer_path: Path | None = None,
    tokenizer_type: str = "SentencePieceTokenizer",
) -> MemoryReader:
    cfg = Config(model=model, tokenizer=TokenizerConfig(tokenizer_type=tokenizer_type))
    return MemoryReader(cfg, vocab_size, tensors, tokenizer_path)


def reference_logits(m: ModelConfig, p: dict[str, Tensor], tokens_BS: Tensor) -> Tensor:
    """The forward pass in the plainest torch, from the global tensors alone; [batch, sequence, vocabulary]."""

    def norm(x: Tensor, name: str) -> Tensor:
        if m.normalization == "LayerNorm":
            return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], m.norm_epsilon)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.norm_epsilon) * p[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias", torch.zeros(()))
        return torch.einsum("bsi,...i->bs...", x, weight) + bias

    def rotate(x_BSK: Tensor) -> Tensor:
        half = m.rotary_dim // 2
        frequency = m.rotary_base ** (-2 * torch.arange(half) / m.rotary_dim) if half else torch.zeros(0)
        angle = torch.arange(x_BSK.shape[1])[:, None] * frequency
        first, second, rest = x_BSK[..., :half], x_BSK[..., half : 2 * half], x_BSK[..., 2 * half :]
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat([*turned, rest], dim=-1)

    def attention(x: Tensor, name: str) -> Tensor:
        qkv = linear(x, f"{name}.qkv")  # [B, S, G, N + 2, K]
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        heads = []
        for g in range(m.num_kv_heads):
            key, value = rotate(qkv[:, :, g, -2]), qkv[:, :, g, -1]
            for n in range(m.num_attention_heads // m.num_kv_heads):
                scores = rotate(qkv[:, :, g, n]) @ key.transpose(1, 2) / math.sqrt(m.head_dim)
                heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
        return linear(torch.cat(heads, dim=-1), f"{name}.output")

    def mlp(x: Tensor, name: str) -> Tensor:
        up = linear(x, f"{name}.up")
        if m.is_gated:
            return linear(F.silu(up[:, :, 0]) * up[:, :, 1], f"{name}.down")
        return linear(F.gelu(up, approximate="tanh" if m.activation == "gelu_tanh" else "none"), f"{name}.down")

    x = p["embedding.word.weight"][tokens_BS]
    if m.position_embedding_type == "learned_absolute":
        x = x + p["embedding.position.weight"][: tokens_BS.shape[1]]
    for i in range(m.num_layers):
        attended = x + attention(norm(x, f"layers.{i}.attention_norm"), f"layers.{i}.attention")
        x = attended + mlp(norm(x if m.parallel_residual else attended, f"layers.{i}.mlp_norm"), f"layers.{i}.mlp")
    return norm(x, "final_norm") @ p["embedding.word.weight" if m.tied else "head.weight"].T


def megapoly_logits(m: ModelConfig, tensors: dict[str, Tensor], tokens_BS: Tensor) -> Tensor:
    """The same by megapoly's own model on one process."""
    stage = Stage(0, m.num_layers, has_embedding=True, has_head=True)
    model = Transformer(
        Config(model=m),
        VOCAB,
        stage,
        Placement(Axis("tp"), False, torch.float32, torch.device("cpu")),
        choose({}, torch.device("cpu")),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()[tuple(slice(size) for size in tensors[name].shape)] = tensors[name]
        return model.logits(model(tokens_BS))[:, :VOCAB].unflatten(0, tokens_BS.shape)


def some_tokens(m: ModelConfig) -> Tensor:
    return torch.randint(0, VOCAB, (2, m.seq_length), generator=torch.Generator().manual_seed(2))


def assert_export_agrees(reader: Reader, folder: Path, logits: Callable[[Tensor], Tensor], atol: float = 1e-4) -> Any:
    """Export a checkpoint of whatever layout, load it with transformers, compare keys and logits [B, S, V]."""
    export(reader, folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    tokens_BS = some_tokens(reader.config.model)
    with torch.no_grad():
        theirs = model.eval()(tokens_BS).logits
    torch.testing.assert_close(theirs, logits(tokens_BS), atol=atol, rtol=0)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers_and_with_plain_torch(case: str, tmp_path: Path) -> None:
    m = CASES[case]
    tensors = random_parameters(m)
    reader = make_reader(m, tensors)
    model = assert_export_agrees(reader, tmp_path / "hf", lambda t: reference_logits(m, tensors, t))
    tokens_BS = some_tokens(m)
    expected = reference_logits(m, tensors, tokens_BS)
    assert expected.std() > 0.1, "logits that are all alike would agree with anything"
    torch.testing.assert_close(megapoly_logits(m, tensors, tokens_BS), expected, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())
    assert model.get_input_embeddings().weight.shape[0] == VOCAB


@pytest.mark.parametrize("case", ["gpt2-tied", "neox-parallel", "neox-sequential-tied", "llama-gqa"])
def test_the_file_holds_the_names_of_published_checkpoints(case: str, tmp_path: Path) -> None:
    m = CASES[case]
    export(make_reader(m, random_parameters(m)), tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    head = {"gpt2": "lm_head.weight", "gpt_neox": "embed_out.weight", "llama": "lm_head.weight"}[hf_family(m)]
    assert (head in names) == (not m.tied)
    assert metadata == {"format": "pt"}
    if hf_family(m) == "gpt2":
        assert shapes["transformer.h.1.attn.c_attn.weight"] == (48, 3 * 48)
        assert shapes["transformer.h.1.mlp.c_fc.weight"] == (48, 80)


def test_shards_hold_every_tensor_once_and_are_no_larger_than_asked(tmp_path: Path) -> None:
    m = CASES["llama-gqa"]
    tensors = random_parameters(m)
    limit = 20_000
    export(make_reader(m, tensors), tmp_path / "one")
    export(make_reader(m, tensors), tmp_path / "many", max_shard_bytes=limit)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    held: dict[str, Tensor] = {}
    for file in files:
        with safe_open(tmp_path / "many" / file, "pt") as shard:
            here = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        assert sum(t.nbytes for t in here.values()) <= limit or len(here) == 1
        assert all(index["weight_map"][name] == file for name in here) and not here.keys() & held.keys()
        held |= here
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize(("held", "asked", "written"), [
    (torch.bfloat16, None, torch.bfloat16), (torch.float32, "bf16", torch.bfloat16),
    (torch.bfloat16, "fp32", torch.float32), (torch.float32, "fp16", torch.float16),
])  # fmt: skip
def test_the_type_is_kept_unless_another_is_asked_for(
    held: torch.dtype, asked: str | None, written: torch.dtype, tmp_path: Path
) -> None:
    m = CASES["gpt2-tied"]
    tensors = {name: t.to(held) for name, t in random_parameters(m).items()}
    model: Any = AutoModelForCausalLM.from_pretrained(export(make_reader(m, tensors), tmp_path / "hf", asked))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert model.dtype == written and config["dtype"] == config["torch_dtype"] == str(written).removeprefix("torch.")
    assert torch.equal(model.transformer.wte.weight, tensors["embedding.word.weight"].to(written))


def test_configs_hold_the_fields_of_both_generations() -> None:
    """Version 5 reads dtype and rope_parameters; version 4 reads torch_dtype and the rotary fields at the top."""
    neox = hf_config(CASES["neox-head-dim-256"], 30_003, torch.float16)
    assert (neox["rotary_pct"], neox["rotary_emb_base"]) == (0.25, 321.0)
    assert neox["rope_parameters"] == {"rope_type": "default", "rope_theta": 321.0, "partial_rotary_factor": 0.25}
    assert (neox["hidden_act"], neox["use_parallel_residual"]) == ("gelu_pytorch_tanh", True)
    llama = hf_config(CASES["llama-gqa"], 32_000, torch.bfloat16)
    assert llama["rope_theta"] == llama["rope_parameters"]["rope_theta"] == 321.0
    assert (llama["num_key_value_heads"], llama["head_dim"], llama["rms_norm_eps"]) == (2, 12, 3e-3)
    gpt2 = hf_config(BASE, 256_000, torch.bfloat16)
    assert [gpt2[key] for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")] == [0.0, 0.0, 0.0]
    assert (gpt2["vocab_size"], gpt2["tie_word_embeddings"], gpt2["n_inner"]) == (256_000, True, 80)
    for config in (neox, llama, gpt2):
        read = AutoConfig.for_model(**config)
        again = read.to_dict()
        assert again["rope_parameters"] == config["rope_parameters"] if "rope_parameters" in config else True
        changed = {key for key, value in config.items() if key in again and again[key] != value}
        assert not changed - {"torch_dtype", "dtype"}


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    m = CASES["gpt2-tied"]
    reader = make_reader(m, random_parameters(m))
    target = tmp_path / "hf"
    target.mkdir()
    export(reader, target, max_shard_bytes=10_000)
    assert (target / "model.safetensors.index.json").is_file()
    export(replace(reader, step=8), target)
    assert not (target / "model.safetensors.index.json").exists(), "shards of the earlier export are gone"
    assert json.loads((target / MANIFEST).read_text())["step"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (target / "model.safetensors").stat().st_mode == (target / "config.json").stat().st_mode
    (target / "README.md").write_text("by hand")
    with pytest.raises(CheckpointError, match=r"holds 'README\.md', which no export wrote"):
        export(reader, target)
    assert (target / "README.md").is_file() and (target / "model.safetensors").is_file()
    for damaged in ("{", "[]", '{"files": 3}'):
        (target / MANIFEST).write_text(damaged)
        with pytest.raises(CheckpointError, match="choose another --save"):
            export(reader, target)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not a directory"):
        export(reader, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export(reader, tmp_path / "file" / "below")


def test_a_failing_read_leaves_the_earlier_export_in_place(tmp_path: Path) -> None:
    m = CASES["gpt2-tied"]
    reader = make_reader(m, random_parameters(m))
    export(reader, tmp_path / "hf")

    class Failing(MemoryReader):
        def get(self, name: str) -> Tensor:
            if name == "final_norm.weight":
                raise CheckpointError("damaged")
            return super().get(name)

    failing = Failing(reader.config, VOCAB, reader.tensors)
    with pytest.raises(CheckpointError, match="damaged"):
        export(failing, tmp_path / "hf", max_shard_bytes=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.n_layer == 2


def test_what_would_lose_something_is_refused_in_one_line(tmp_path: Path) -> None:
    m = CASES["gpt2-tied"]
    tensors = random_parameters(m)
    padded = tensors | {"embedding.word.weight": torch.zeros(128, 48)}
    loud = tensors | {"layers.1.mlp.up.bias": torch.full((80,), 7e4)}
    geglu = replace(CASES["llama-gqa"], activation="geglu")
    for reader, dtype, kind, message in (
        (make_reader(m, padded), None, CheckpointError, "has 128 rows, the checkpoint's vocabulary 101"),
        (make_reader(m, loud), "fp16", CheckpointError, "'layers.1.mlp.up.bias' exceeds the range of fp16"),
        (make_reader(m, tensors), "int4", ConfigError, "dtype 'int4' is unknown; known: fp32, bf16, fp16"),
        (make_reader(geglu, tensors), None, ConfigError, "activation (geglu) cannot be exported"),
    ):
        with pytest.raises(kind) as caught:
            export(reader, tmp_path / "hf", dtype)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_the_check_of_the_tool_finds_a_missing_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers itself only warns, and fills the gap with random numbers."""
    spec = importlib.util.spec_from_file_location("convert_to_hf", ROOT / "tools" / "convert_to_hf.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    m = CASES["llama-gqa"]
    folder = export(make_reader(m, random_parameters(m)), tmp_path / "hf")
    tool.check(folder)
    assert "LlamaForCausalLM: 46,800 parameters" in capsys.readouterr().out
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: \['model\.layers\.1\.mlp\.gate_proj\.weight'\]"):
        tool.check(folder)
