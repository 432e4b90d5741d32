"""From a checkpoint written by TP 2 x PP 2 ranks after real steps: our logits are those of the export in transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_export import assert_export_agrees
from tiny_runs import tiny_config, tiny_prepared

from megapoly.checkpoint.load import CheckpointReader
from megapoly.generate.sample import load_model
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config
from megapoly.train.loop import train
from megapoly.train.setup import build_run

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"num_query_groups": None}),
    "gpt_neox": ("gpt_neox", {"num_query_groups": None}),
    "gpt_neox, head_dim 256": (
        "gpt_neox",
        {"num_attention_heads": 2, "num_query_groups": None, "hidden_size": 512, "rotary_percent": 0.25},
    ),
    "llama": ("llama", {}),
    "gpt2, muP": (
        "gpt2",
        {"num_query_groups": None, "use_mup": True, "mup_base_hidden_size": 50, "init_method_std": 0.1},
    ),
    "llama, muP": ("llama", {"use_mup": True, "mup_base_hidden_size": 36, "init_method_std": 0.1}),
}


def train_and_save(mesh: Mesh, cfg: Config) -> None:
    run = build_run(tiny_prepared(cfg), mesh)
    # Norms and biases off their initial ones and zeros, so that one that is left out shows.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for segment in run.buffers.segments:
            if not segment.is_decayed and segment.shard.dim is None:
                segment.parameter.add_(0.3 * torch.randn(segment.parameter.shape, generator=generator))
                generator.manual_seed(len(segment.name))
    train(run)


def test_text_from_a_run_that_compiled_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 2)
    train_and_save(single_process_mesh(), cfg)
    compiled = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, torch_compile=True))
    monkeypatch.setattr(CheckpointReader, "config", compiled)
    reader = CheckpointReader.open(cfg.logging.run_dir)
    monkeypatch.delattr(torch, "compile")
    assert load_model(reader)(torch.tensor([[1, 2, 3]])).isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_export_are_ours(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    cfg = tiny_config(
        tmp_path, family, 2, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
    )
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **changes))
    run_ranks(train_and_save, cfg, tp=2, pp=2)
    reader = CheckpointReader.open(cfg.logging.run_dir)
    assert reader.config.parallel.tensor_model_parallel_size == 2
    model = load_model(reader)

    def our_logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model.logits(model(tokens_BS))[:, : reader.vocab_size]
        assert logits.std() > 0.05, "logits that are all alike would agree with anything"
        return logits.view(*tokens_BS.shape, -1)

    exported = assert_export_agrees(reader, tmp_path / "hf", our_logits)
    assert type(exported).__name__ == {"gpt2": "GPT2", "llama": "Llama"}.get(family, "GPTNeoX") + (
        "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    )
