"""A stopped and resumed run equals one never stopped, byte for byte; a checkpoint loads on other layouts bit-equal."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from ranks import run_ranks
from tiny_runs import VOCAB, run_to_end, tiny_config, tiny_prepared, whole_state
from tokenizers import models

from megapoly.checkpoint.load import CheckpointReader, find_checkpoint, load_checkpoint
from megapoly.data.realised import without_times
from megapoly.errors import CheckpointError, DamageError
from megapoly.generate.sample import load_model
from megapoly.hf.tokenizer import write_tokenizer
from megapoly.model.count import parameter_shapes
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config
from megapoly.tokenizer.load import load_tokenizer
from megapoly.train.loop import make_saver
from megapoly.train.setup import build_run

STEPS = 6


def rows(cfg: Config) -> list[dict[str, Any]]:
    text = Path(cfg.logging.run_dir, "metrics.jsonl").read_text()
    return [without_times(json.loads(line)) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "family", "options"),
    [
        (2, 2, 2, "gpt2", {"save_interval": 1, "most_recent_k": 2, "hidden_dropout": 0.1}),
        (1, 1, 2, "llama", {"bf16": True}),
        (1, 2, 1, "gpt2", {"bf16": True, "pipeline_schedule": "zb-v"}),
        (2, 1, 2, "llama", {"bf16": True, "optimizer": "muon"}),
        (2, 2, 2, "gpt2", {"bf16": True, "pipeline_vocab_parallel": True, "sequence_parallel": True}),
    ],
)
def test_resume_is_bit_equal(
    tp: int, pp: int, dp: int, family: str, options: dict[str, Any], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **options}
    straight = tiny_config(tmp_path, family, STEPS, run_dir=str(tmp_path / "straight"), **layout)
    parts = {"run_dir": str(tmp_path / "parts"), **layout}
    ranks = {"tp": tp, "pp": pp, "dp": dp, "shares_vocab": straight.parallel.shares_head}
    expected = run_ranks(run_to_end, straight, **ranks)[0]
    # Step 2 lies within the first stage, step 3 on its border (exit_interval stops at every multiple).
    run_ranks(run_to_end, tiny_config(tmp_path, family, STEPS, exit_interval=2, **parts), **ranks)
    run_ranks(run_to_end, tiny_config(tmp_path, family, STEPS, exit_interval=3, **parts), **ranks)
    resumed = run_ranks(run_to_end, tiny_config(tmp_path, family, STEPS, **parts), **ranks)[0]
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), f"{name} differs after resuming"
    assert rows(tiny_config(tmp_path, family, STEPS, **parts)) == rows(straight)
    assert "resuming" in capfd.readouterr().out


def saved(
    tmp_path: Path, family: str = "gpt2", tp: int = 2, pp: int = 2, dp: int = 2, **options: Any
) -> tuple[Config, Any]:
    cfg = tiny_config(tmp_path, family, 2, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **options)
    return cfg, run_ranks(run_to_end, cfg, tp=tp, pp=pp, dp=dp)[0]


def load_state(mesh: Mesh, cfg: Config) -> dict[str, torch.Tensor]:
    run = build_run(tiny_prepared(cfg), mesh)
    load_checkpoint(CheckpointReader.open(cfg.logging.run_dir), run.optimizer)
    return whole_state(run)


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [((1, 1, 1), "adam"), ((2, 1, 1), "adam"), ((1, 3, 1), "adam"), ((1, 1, 3), "adam"), ((2, 1, 2), "adam"),
     ((1, 3, 1), "muon"), ((1, 1, 3), "muon")],
)  # fmt: skip
def test_another_layout_loads_the_same_bits(layout: tuple[int, int, int], optimizer: str, tmp_path: Path) -> None:
    tp, pp, dp = layout
    cfg, expected = saved(tmp_path, optimizer=optimizer)
    parallel = dataclasses.replace(cfg.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    batch = dataclasses.replace(cfg.train, global_batch_size=6)
    other = dataclasses.replace(cfg, parallel=parallel, train=batch)
    loaded = run_ranks(load_state, other, tp=tp, pp=pp, dp=dp)[0]
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_another_schedule_loads_the_same_bits(family: str, tmp_path: Path) -> None:
    """Saved from a folded model of two chunks, loaded by rounds, without chunks and by one rank, and back."""

    def cfg(pp: int, schedule: str, chunks: int | None = None) -> Config:
        return tiny_config(
            tmp_path, family, 2, pipeline_model_parallel_size=pp, pipeline_schedule=schedule,
            num_virtual_stages_per_pipeline_rank=chunks,
        )  # fmt: skip

    expected = run_ranks(run_to_end, cfg(2, "zb-v"), pp=2)[0]
    for pp, schedule, chunks in ((2, "interleaved", 2), (3, "1f1b", 1), (1, "interleaved", 3), (2, "zb-v", 2)):
        loaded = run_ranks(load_state, cfg(pp, schedule, chunks), pp=pp)[0]
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), (schedule, name)


@pytest.mark.parametrize(
    ("bf16", "first", "then"),
    [
        (False, ((1, 1, 4, 2), 40_000), ((1, 2, 3, 1), 1)),
        (True, ((2, 1, 2, 1), 1), ((1, 1, 4, 4), 40_000)),
        (True, ((1, 2, 4, 2), 1 << 40), ((1, 1, 1, 1), 40_000)),
        (False, ((1, 1, 1, 1), 1), ((2, 1, 4, 2), 40_000)),
    ],
)
def test_neither_shards_nor_instances_nor_buckets_are_in_a_checkpoint(
    bf16: bool, first: tuple, then: tuple, tmp_path: Path
) -> None:
    """Saved on one (tp, pp, dp, instances) and bucket size, loaded on another: the same bits, moments included."""

    def on(layout: tuple[int, int, int, int], bucket_size: int) -> tuple[Config, dict[str, int]]:
        tp, pp, dp, instances = layout
        cfg = tiny_config(
            tmp_path, "gpt2", 2, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, bf16=bf16,
            num_distributed_optimizer_instances=instances, ddp_bucket_size=bucket_size, global_batch_size=12,
        )  # fmt: skip
        return cfg, {"tp": tp, "pp": pp, "dp": dp, "instances": instances}

    cfg, ranks = on(*first)
    expected = run_ranks(run_to_end, cfg, **ranks)[0]
    assert all(tensor.any() for name, tensor in expected.items() if name.startswith("exp_avg_sq"))
    cfg, ranks = on(*then)
    for loaded in run_ranks(load_state, cfg, **ranks):
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    ("family", "saves_shared", "options"),
    [
        ("llama", True, {}),
        ("llama", False, {}),
        ("gpt2", True, {"make_vocab_size_divisible_by": 1}),
        ("gpt2", False, {}),
        ("gpt2", True, {"bf16": True, "optimizer": "muon"}),
    ],
)
def test_a_head_shared_by_pipeline_ranks_is_in_no_checkpoint(
    family: str, saves_shared: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    def on(tp: int, pp: int, dp: int, shares: bool) -> tuple[Config, dict[str, Any]]:
        cfg = tiny_config(
            tmp_path, family, 2, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
            pipeline_vocab_parallel=shares, **options,
        )  # fmt: skip
        return cfg, {"tp": tp, "pp": pp, "dp": dp, "shares_vocab": shares}

    matrix = "head.weight" if family == "llama" else "embedding.word.weight"
    cfg, ranks = on(2, 2, 1, saves_shared)
    expected = run_ranks(run_to_end, cfg, **ranks)[0]
    assert expected[f"model.{matrix}"].shape == expected[f"exp_avg.{matrix}"].shape == (1003, 144)
    assert ("model.head.weight" in expected) == (family == "llama")
    for layout in ((1, 3, 2, not saves_shared), (1, 1, 1, False), (1, 2, 2, True), (2, 2, 1, not saves_shared)):
        cfg, ranks = on(*layout)
        loaded = run_ranks(load_state, cfg, **ranks)[0]
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), name
    assert load_model(CheckpointReader.open(tmp_path / "run")).head_weight.shape[0] >= 1003


def test_padding_is_never_on_disk(tmp_path: Path) -> None:
    saved(tmp_path)
    reader = CheckpointReader.open(tmp_path / "run")
    assert reader.get("embedding.word.weight").shape == (1003, 144)
    assert dict(parameter_shapes(reader.config.model, 1003)).keys() == set(reader.names)


def test_latest_is_found_from_run_checkpoints_and_step(tmp_path: Path) -> None:
    saved(tmp_path, tp=1, pp=1, dp=1)
    step = tmp_path / "run/checkpoints/step_00000002"
    assert (
        find_checkpoint(tmp_path / "run")
        == find_checkpoint(tmp_path / "run/checkpoints")
        == find_checkpoint(step)
        == step
    )
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find_checkpoint(tmp_path)


def test_a_run_made_longer_goes_on_after_its_short_last_batch(tmp_path: Path) -> None:
    run_ranks(run_to_end, tiny_config(tmp_path, "gpt2", 4, train_samples=19))
    assert CheckpointReader.open(tmp_path / "run").samples == 19
    run_ranks(run_to_end, tiny_config(tmp_path, "gpt2", 4))
    after = rows(tiny_config(tmp_path, "gpt2", 4))
    assert [row["samples"] for row in after] == [8, 16, 19, 27, 32]
    assert [sum(row["tokens_by_source"].values()) for row in after] == [16 * n for n in (8, 8, 3, 8, 5)]


def test_checkpoints_hold_the_tokenizer_that_the_run_began_with(tmp_path: Path) -> None:
    class Tokenizer:
        tokenizer_type, path = "SentencePieceTokenizer", str(tmp_path / "x.model")

    Path(Tokenizer.path).write_bytes(b"pieces")
    prepared = dataclasses.replace(tiny_prepared(tiny_config(tmp_path, "gpt2", 4)), tokenizer=Tokenizer())
    run = build_run(prepared, single_process_mesh())
    saver = make_saver(run)
    Path(Tokenizer.path).unlink()
    saver.save(1, run.checkpoint_state(1))
    Path(Tokenizer.path).write_bytes(b"others")
    saver.save(2, run.checkpoint_state(2))
    saver.wait()
    after_a_rollback = make_saver(run)
    after_a_rollback.save(3, run.checkpoint_state(3))
    after_a_rollback.wait()
    for step in (1, 2, 3):
        found = CheckpointReader.at(tmp_path / f"run/checkpoints/step_0000000{step}").tokenizer_path
        assert found is not None and found.read_bytes() == b"pieces"


def test_a_tokenizers_chat_template_goes_through_a_checkpoint_into_an_export(tmp_path: Path) -> None:
    home, exported = tmp_path / "tokenizer", tmp_path / "exported"
    home.mkdir()
    exported.mkdir()
    vocabulary = models.WordLevel({"</s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizers.Tokenizer(vocabulary).save(str(home / "tokenizer.json"))
    (home / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(home))
    prepared = dataclasses.replace(tiny_prepared(tiny_config(tmp_path, "gpt2", 2)), tokenizer=tokenizer)
    run = build_run(prepared, single_process_mesh())
    saver = make_saver(run)
    saver.save(1, run.checkpoint_state(1))
    saver.wait()
    reader = CheckpointReader.open(tmp_path / "run")
    write_tokenizer(load_tokenizer("HuggingFaceTokenizer", str(reader.tokenizer_path)), exported, VOCAB, 16)
    assert (exported / "chat_template.jinja").read_text() == "{{ messages }}"
    (reader.folder / "chat_template.jinja").write_text("{{ damaged  }}"[:14])
    with pytest.raises(DamageError, match="chat_template.jinja: its checksum does not fit"):
        _ = reader.tokenizer_path
