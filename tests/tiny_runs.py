"""Small real runs for tests: random token files on disk, the three families at awkward sizes."""

import dataclasses
import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ranks import assemble

from megapoly.checkpoint.state import pieces, training_state
from megapoly.checkpoint.storage import sealed
from megapoly.config import SECTIONS, build
from megapoly.data.curriculum import open_sources, plan_for
from megapoly.data.indexed import IndexedDatasetWriter, TokenStream
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config, ModelConfig
from megapoly.train.loop import train
from megapoly.train.prepare import Prepared, hashes_of_data, resolve, run_length, with_start
from megapoly.train.setup import Run, build_run

VOCAB = 1003
COMMON: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 144,
    "ffn_hidden_size": 200,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "seq_length": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": COMMON,
    "gpt_neox": COMMON
    | {
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "activation": "gelu",
        "parallel_residual": True,
        "untie_embeddings_and_output_weights": True,
    },
    "llama": COMMON
    | {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    },
}


def keep_first_gradients(run: Run) -> dict[str, torch.Tensor]:
    """A dictionary that the run's first reduction fills with the whole gradients, by name."""
    gradients: dict[str, torch.Tensor] = {}
    finish = run.buffers.finish

    def finish_and_keep() -> torch.Tensor:
        owned = finish()
        if not gradients:
            gradients.update(assemble(pieces(run.buffers, {"grad": owned}, for_saving=True)))
        return owned

    run.buffers.finish = finish_and_keep
    return gradients


def write_tokens(prefix: Path, num_tokens: int, seed: int, vocab: int = VOCAB) -> None:
    """A .bin/.idx pair of documents of random tokens whose frequencies fall, as in text."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(str(prefix), vocab) as writer:
        left = num_tokens
        while left:
            length = min(int(rng.integers(5, 60)), left)
            writer.add_document((rng.random(length) ** 3 * vocab).astype(np.int64))
            left -= length
        writer.finalize()


def tiny_config(folder: Path, family: str, steps: int = 20, **leaves: Any) -> Config:
    """A configuration over two sources in `folder` (written if missing) and two stages; leaves override any section."""
    for number, name in enumerate(("en", "ko")):
        if not (folder / f"{name}_text_document.idx").exists():
            write_tokens(folder / f"{name}_text_document", 4000, number)
            write_tokens(folder / f"{name}_valid_text_document", 205, 10 + number)
    length, batch = FAMILIES[family]["seq_length"], 8
    half = steps // 2 * batch * length
    tree: dict[str, dict[str, Any]] = {
        "model": dict(FAMILIES[family]),
        "tokenizer": {"vocab_size": VOCAB},
        "data": {
            "data_root": str(folder),
            "sources": [
                {
                    "name": name,
                    "language": name,
                    "paths": [str(folder / f"{name}_text_document")],
                    "valid_paths": [str(folder / f"{name}_valid_text_document")],
                }
                for name in ("en", "ko")
            ],
        },
        "curriculum": {
            "stages": [
                {"name": "one", "tokens": half, "non_english_share": 0.3},
                {"name": "two", "tokens": steps * batch * length - half, "non_english_share": 0.6},
            ]
        },
        "schedule": {"lr": 1e-3, "lr_warmup_iters": 4},
        "train": {"micro_batch_size": 1, "global_batch_size": batch},
        "logging": {"run_dir": str(folder / "run"), "tensorboard": False},
    }
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            if field.name in leaves:
                tree.setdefault(section, {})[field.name] = leaves.pop(field.name)
    assert not leaves, leaves
    cfg = Config(**{section: build(SECTIONS[section], entries, section) for section, entries in tree.items()})
    return resolve(cfg, has_cuda=False)


def tiny_prepared(cfg: Config) -> Prepared:
    """As megapoly.train.prepare.prepare, but without a tokenizer: the vocabulary's size is given, and 0 ends documents."""
    streams = open_sources(cfg, VOCAB)
    plan = plan_for(cfg, streams)
    valid = [TokenStream(source.valid_paths, VOCAB) for source in cfg.data.sources]
    ends = SimpleNamespace(eod=0) if cfg.data.reset_attention_mask or cfg.data.eod_mask_loss else None
    hashes = hashes_of_data(cfg, None)
    return Prepared(cfg, ends, VOCAB, streams, valid, plan, run_length(cfg, plan), data_hashes=hashes)


def tiny_run(mesh: Mesh, cfg: Config) -> Run:
    """A run on a mesh, ready to step."""
    return build_run(tiny_prepared(cfg), mesh)


def model_config(family: str, **changes: Any) -> ModelConfig:
    """The family's small model with some options changed."""
    return ModelConfig(**(FAMILIES[family] | changes))


def whole_state(run: Run) -> dict[str, torch.Tensor]:
    """Master weights and the optimizer's state, whole, by name."""
    return assemble(pieces(run.buffers, training_state(run.optimizer), for_saving=True))


def reseal(folder: Path, change: dict[str, Any] | None = None) -> None:
    """Give metadata.json, changed, checksums that fit: what a forger would do, and no failing disk does."""
    tree = json.loads((folder / "metadata.json").read_text())
    del tree["crc32"]
    state = (folder / "state.json").read_bytes()
    tree["files"]["state.json"] = [len(state), zlib.crc32(state), len(state)]
    (folder / "metadata.json").write_bytes(sealed(tree | (change or {})))


def run_to_end(mesh: Mesh, cfg: Config) -> dict[str, torch.Tensor]:
    """Train, resuming from the run's own checkpoint where there is one; the state at the end."""
    run = build_run(with_start(tiny_prepared(cfg), {}), mesh)
    train(run)
    return whole_state(run)
