"""A checkpoint as a Hugging Face directory: safetensors shards, config, generation config, tokenizer."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megapoly.errors import CheckpointError, ConfigError
from megapoly.hf.names import ARCHITECTURES, hf_family, to_hf
from megapoly.hf.tokenizer import write_tokenizer
from megapoly.sections import Config, ModelConfig
from megapoly.tokenizer.load import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MANIFEST = "megapoly_export.json"  # lists what an export wrote, so that a later one may replace it and nothing else
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "swiglu": "silu"}


class Reader(Protocol):
    """The part of a checkpoint reader that an export needs."""

    @property
    def config(self) -> Config:
        """The configuration of the run."""

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, without padding."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def names(self) -> list[str]:
        """Names of all parameters."""

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer's file or folder; None leaves it out of the export."""

    def get(self, name: str) -> Tensor:
        """The whole parameter, whatever the layout that wrote it; raises CheckpointError."""


def export(
    reader: Reader, save_dir: str | Path, dtype: str | None = None, max_shard_bytes: int = 5_000_000_000
) -> Path:
    """Write a directory that `transformers` 4.4x and 5.x load as GPT2LMHeadModel, GPTNeoX- or LlamaForCausalLM.

    `dtype` is fp32, bf16, fp16 or None for the parameters' own. One shard is in memory at a time. The directory appears
    whole or not at all; it may replace an earlier export. Raises ConfigError for options that no class computes,
    CheckpointError for damage and for a `save_dir` that cannot be used, TokenizerError.
    """
    target = Path(os.path.abspath(save_dir))
    model = reader.config.model
    hf_family(model)  # refuses what no class computes before anything is written
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is unknown; known: {', '.join(DTYPES)}")
    if max_shard_bytes <= 0:
        raise ConfigError(f"max_shard_bytes ({max_shard_bytes}) must be positive")
    _require_replaceable(target)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        tokenizer = None
        if reader.tokenizer_path is not None:
            tokenizer = load_tokenizer(reader.config.tokenizer.tokenizer_type, str(reader.tokenizer_path))
            write_tokenizer(tokenizer, partial, reader.vocab_size, model.max_positions)
        tensors = _converted(reader, DTYPES[dtype] if dtype else None)
        parameters, found = _write_shards(tensors, partial, max_shard_bytes)
        _write_configs(hf_config(model, reader.vocab_size, found), tokenizer, partial)
        files = sorted(path.name for path in partial.iterdir())
        _write_json(partial / MANIFEST, {"step": reader.step, "parameters": parameters, "files": files})
        _swap(partial, target)
    except OSError as error:
        raise CheckpointError(f"{error.filename or target}: cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:  # a full disk, as safetensors reports it
        raise CheckpointError(f"{target}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


# ------------------------------------------------------------------------------------------------- directories


def _require_replaceable(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target}: exists and is not a directory; choose another --save")
    present = {path.name for path in target.iterdir()}
    if not present:
        return
    written: set[str] = set()
    if MANIFEST in present:
        try:
            written = {MANIFEST, *json.loads((target / MANIFEST).read_text(encoding="utf-8"))["files"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{target / MANIFEST}: damaged ({error}); choose another --save") from None
    if foreign := present - {name for name in written if (target / str(name)).is_file()}:
        raise CheckpointError(f"{target}: holds '{min(foreign)}', which no export wrote; choose another --save")


def _swap(partial: Path, target: Path) -> None:
    """Put a finished export in place; an earlier one is gone only once the new one stands."""
    if not target.exists():
        partial.rename(target)
        return
    earlier = partial.with_name(partial.name + "-earlier")
    target.rename(earlier)
    try:
        partial.rename(target)
    except OSError:
        earlier.rename(target)
        raise
    shutil.rmtree(earlier)


# ---------------------------------------------------------------------------------------------------- weights


def _converted(reader: Reader, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the export in their final type, checked against the vocabulary and fp16's range."""

    def get(name: str) -> Tensor:
        tensor = without_multipliers(reader.config.model, name, reader.get(name).detach().cpu())
        if name in ("embedding.word.weight", "head.weight") and tensor.shape[0] != reader.vocab_size:
            raise CheckpointError(
                f"parameter '{name}' has {tensor.shape[0]} rows, the checkpoint's vocabulary {reader.vocab_size}"
            )
        if dtype is None:
            return tensor
        converted = tensor.to(dtype)
        if dtype == torch.float16 and converted.isinf().any() and not tensor.isinf().any():
            raise CheckpointError(f"parameter '{name}' exceeds the range of fp16; use --dtype bf16")
        return converted

    for name, tensor in to_hf(reader.config.model, reader.names, get):
        yield name, tensor.contiguous()


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> tuple[int, torch.dtype]:
    """Write one safetensors file, or several and their index; returns the parameter count and the common type."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    parameters = total_bytes = pending_bytes = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        nonlocal pending_bytes
        path = folder / f"shard-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        parameters += tensor.numel()
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    flush()
    assert dtype is not None, "every model has an embedding"
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return parameters, dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes, "total_parameters": parameters}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return parameters, dtype


def without_multipliers(model: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """The parameter with muP's multipliers folded in, for a class that has none of them.

    The final norm takes the logits' factor (a tied head could not), queries what makes their classes' head_dim^-1/2
    a 1/head_dim. Exact where these are powers of two, else rounded in the parameter's type.
    """
    if not model.use_mup:
        return tensor
    if name.startswith("final_norm."):
        return tensor / model.width_multiple
    if ".attention.qkv." in name:  # [groups, queries + key + value, head_dim, ..]
        return torch.cat([tensor[:, :-2] * model.head_dim**-0.5, tensor[:, -2:]], dim=1)
    return tensor


# ---------------------------------------------------------------------------------------------------- configs


def _write_configs(config: dict[str, Any], tokenizer: Tokenizer | None, folder: Path) -> None:
    ids = {"bos_token_id": tokenizer.bos if tokenizer else None, "eos_token_id": tokenizer.eod if tokenizer else None}
    _write_json(folder / "config.json", config | ids)
    _write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})


def hf_config(model: ModelConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of config.json without token ids, for both generations of `transformers`.

    Version 5 reads `dtype` and `rope_parameters`; version 4 reads `torch_dtype`, `rope_theta`, `rotary_pct` and
    `rotary_emb_base`. What equals a class's default is written too: defaults change between versions.
    """
    family = hf_family(model)
    dtype_name = str(dtype).removeprefix("torch.")
    common = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }
    if family == "gpt2":
        return common | _gpt2_config(model)
    shared = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_positions,
        "hidden_act": _ACTIVATIONS[model.activation],
        "attention_dropout": 0.0,
        "rope_scaling": None,
    }
    return common | shared | (_llama_config(model) if family == "llama" else _gpt_neox_config(model))


def _gpt2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": model.max_positions,
        "n_ctx": model.max_positions,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "activation_function": _ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }


def _gpt_neox_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
        "hidden_dropout": 0.0,
        "classifier_dropout": 0.0,
        "rotary_pct": model.rotary_percent,
        "rotary_emb_base": model.rotary_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary_base,
            "partial_rotary_factor": model.rotary_percent,
        },
    }


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "rms_norm_eps": model.norm_epsilon,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
