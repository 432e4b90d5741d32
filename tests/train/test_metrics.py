"""Records: every step's row with its fields, TensorBoard, and what a resume drops."""

import errno
import json
import math
import os
import resource
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import tiny_config, tiny_run

from megapoly.data.plan_report import summary
from megapoly.errors import ConfigError
from megapoly.model.count import flops_per_token
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config
from megapoly.train import rows as module
from megapoly.train.loop import train
from megapoly.train.metrics import Metrics, mean
from megapoly.train.rows import RowFile, drop_rows_after, finite, rows_of


def train_it(mesh: Mesh, cfg: Config) -> dict:
    run = tiny_run(mesh, cfg)
    train(run)
    return summary(run.prepared.plan)


def test_rows_account_for_every_token_and_stage(tmp_path: Path) -> None:
    cfg = tiny_config(
        tmp_path, "llama", 6, log_interval=4, eval_interval=3, peak_tflops=2.0, tensorboard=True,
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    plan = run_ranks(train_it, cfg, pp=2)[0]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # those between reports in arrears
    assert [row["samples"] for row in rows] == [8, 16, 24, 32, 40, 48]
    assert [row["tokens"] for row in rows] == [16 * row["samples"] for row in rows]
    assert [row["stage"] for row in rows] == ["one"] * 3 + ["two"] * 3
    for name, stage in zip(("one", "two"), plan["stages"], strict=True):
        mine = [row for row in rows if row["stage"] == name]
        served = {s["source"]: s["tokens"] for s in stage["sources"]}
        assert {s: sum(row["tokens_by_source"].get(s, 0) for row in mine) for s in served} == served
        assert abs(served["ko"] / 16 - {"one": 0.3, "two": 0.6}[name] * 24) <= 2
    for row in rows:
        tokens, losses = row["tokens_by_source"], row["loss_by_source"]
        assert row["loss"] == pytest.approx(sum(losses[s] * tokens[s] for s in tokens) / sum(tokens.values()))
        assert row["non_english_share"] == tokens.get("ko", 0) / sum(tokens.values())
        flops = flops_per_token(cfg.model, 1003) * row["tokens_per_second"] / 2
        assert row["mfu"] == pytest.approx(flops / 2e12)
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("grad_norm", "params_norm", "seconds"))
        assert ("valid_loss" in row) == (row["step"] in (3, 6))
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert board.Scalars("loss_by_source/ko")[-1].value == pytest.approx(rows[-1]["loss_by_source"]["ko"], rel=1e-6)


def test_rows_have_planned_and_realised_shares_and_losses_by_source_and_language(tmp_path: Path) -> None:
    tiny_config(tmp_path, "gpt2", 6)  # the files
    names = {"en": ("en", "text"), "web-ko": ("ko", "text"), "opus-ko": ("ko", "parallel"), "code": ("en", "code")}
    sources = [
        {"name": name, "language": code, "kind": kind, "paths": [str(tmp_path / f"{code}_text_document")]}
        for name, (code, kind) in names.items()
    ]
    ramp = {"from": 0.2, "to": 0.8, "shape": "steps", "steps": 3}
    stages = [{"name": "one", "tokens": 6 * 8 * 16, "non_english_share": ramp, "code_share": 0.25}]
    options = {"sources": sources, "stages": stages, "num_layers": 1, "log_interval": 4, "tensorboard": True}
    cfg = tiny_config(tmp_path, "gpt2", 6, **options)
    run_ranks(train_it, cfg)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    dials = [0.2, 0.2, 0.5, 0.5, 0.8, 0.8]  # three steps of 16 samples, two batches each
    for row, dial in zip(rows, dials, strict=True):
        wanted = {"en": 0.75 * (1 - dial), "web-ko": 0.375 * dial, "opus-ko": 0.375 * dial, "code": 0.25}
        assert row["planned_share_by_source"] == pytest.approx(wanted, abs=1e-6)
        by_language = {"en": wanted["en"], "ko": 0.75 * dial, "code": 0.25}
        assert row["planned_share_by_language"] == pytest.approx(by_language, abs=1e-6)
        tokens, losses = row["tokens_by_source"], row["loss_by_source"]
        assert row["share_by_source"] == pytest.approx({s: n / 128 for s, n in tokens.items()}, abs=1e-6)
        korean = [name for name in ("web-ko", "opus-ko") if name in tokens]
        assert row["share_by_language"]["ko"] == pytest.approx(sum(tokens[s] for s in korean) / 128, abs=1e-6)
        mean_loss = sum(losses[s] * tokens[s] for s in korean) / sum(tokens[s] for s in korean)
        assert row["loss_by_language"]["ko"] == pytest.approx(mean_loss)
        assert row["loss_by_language"].get("code") == losses.get("code")
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    tags = [f"{kind}/ko" for kind in ("share_by_language", "planned_share_by_language", "loss_by_language")]
    for tag in [*tags, "planned_share_by_source/opus-ko", "share_by_source/en"]:
        assert len(board.Scalars(tag)) >= 5


def test_numbers_that_are_not_finite_become_null() -> None:
    assert finite({"a": math.nan, "b": {"c": math.inf, "d": 1.0}, "e": "x", "f": None}) == {
        "a": None, "b": {"c": None, "d": 1.0}, "e": "x", "f": None,
    }  # fmt: skip
    assert math.isnan(mean({}, {}, ["en"]))


def test_a_resume_drops_later_and_torn_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert drop_rows_after(path, 2) == 0
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert drop_rows_after(tmp_path / "none.jsonl", 2) == 0
    path.write_text('{"step": 1}\n{"st\x00p": 2}\n[]\n\n{"step": 3}\n{"step": 4, "lo')
    assert drop_rows_after(path, 3) == 2  # the last one may be a kill's
    path.write_text('{"step": 1}\n{"st\n{"step": 3}')
    assert drop_rows_after(path, 3) == 1


def test_a_resume_holds_one_row_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [f'{{"step": {i}, "text": "{i:x>5000}"}}\n' for i in range(1000)]
    path.write_text("".join(rows))
    tracemalloc.start()
    assert drop_rows_after(path, 989) == 0
    assert sum(1 for _ in rows_of(path)) == 990
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.read_text() == "".join(rows[:990]) and peak < 500_000
    monkeypatch.setattr(module, "MOST_BYTES", 22)
    path.write_text('{"step": 1}\n' + "x" * 22 + '{"step": 2}\n{"step":          3}\n' + "[" * 70 + "\n")
    assert drop_rows_after(path, 3) == 2  # what is longer than any row, or the rest of it, is none
    assert path.read_text() == '{"step": 1}\n{"step":          3}\n'


def test_rows_that_a_full_disk_does_not_take_follow_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    file = RowFile(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))  # in the middle of step 3: a short write, then none
    try:
        file.write([{"step": 2}])
        for step in (3, 4):
            with pytest.raises(OSError):
                file.write([{"step": step, "loss": 1.0}])
            assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and file.num_waiting == step - 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.write([{"step": 5}])
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4, 5] and file.num_waiting == 0
    file.close()


def test_a_run_goes_on_where_its_records_find_no_room(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows are written once there is room again; TensorBoard is given up; a start without room ends in one line."""
    run = tiny_run(single_process_mesh(), tiny_config(tmp_path, "gpt2", tensorboard=True))
    metrics = Metrics(run)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    metrics._rows = [{"step": 1, "loss": 2.0}]
    with pytest.MonkeyPatch.context() as patch:
        assert metrics._file is not None
        patch.setattr(metrics._file, "_file", SimpleNamespace(write=lambda _: 3, truncate=lambda _: None))
        patch.setattr(metrics._board, "add_scalar", Mock(side_effect=full))
        metrics.write()
        metrics.write()
    metrics._rows = [{"step": 2, "loss": 2.0}]
    metrics.close()
    out = capfd.readouterr().out
    assert out.count("metrics.jsonl cannot be written (No space left on device)") == 1, out
    assert out.count("TensorBoard's files cannot be written") == 1 and "could not be written" not in out
    assert [row["step"] for row in rows_of(Path(run.cfg.logging.run_dir) / "metrics.jsonl")] == [1, 2]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="No space left on device.*make room"):
        patch.setattr(Path, "write_text", Mock(side_effect=full))
        Metrics(run)


def test_bf16_with_an_fp32_stream_trains_alike_on_every_layout(tmp_path: Path) -> None:
    def losses(mesh: Mesh, cfg: Config) -> list[float]:
        from megapoly.train.step import train_step

        run = tiny_run(mesh, cfg)
        assert run.pipeline.dtype == torch.float32 and run.buffers.params.dtype == torch.bfloat16
        assert run.optimizer.master.dtype == run.buffers.grads.dtype == torch.float32
        stats = [train_step(run, step).by_source for step in range(1, 6)]
        return [(s[0].sum() / s[1].sum()).item() for s in stats]

    options = {"bf16": True, "fp32_residual_connection": True}
    alone = run_ranks(losses, tiny_config(tmp_path, "gpt2", **options))[0]
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    together = run_ranks(losses, tiny_config(tmp_path, "gpt2", **options, **layout), tp=2, pp=2)[0]
    assert alone[-1] < alone[0]
    assert together == pytest.approx(alone, rel=torch.finfo(torch.bfloat16).eps)
