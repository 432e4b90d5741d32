"""fp16 with loss scaling: the rule step by step, overflow on one rank, losses near fp32's, resume in its midst."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import reseal, run_to_end, tiny_config, tiny_run

from megapoly.checkpoint.load import CheckpointReader
from megapoly.checks import check_precision
from megapoly.errors import CheckpointError, ConfigError
from megapoly.optim.loss_scale import LossScaler
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config, PrecisionConfig
from megapoly.train.step import train_step

SMALL = {"num_layers": 1, "hidden_size": 48, "ffn_hidden_size": 64, "ddp_bucket_size": 20_000}


def walk(cfg: PrecisionConfig, norms: str) -> list[float]:
    """The scale after each step; x is an overflow, n a NaN, . neither."""
    scaler, scales = LossScaler.of(cfg), []
    for step in norms:
        norm = torch.tensor({"x": torch.inf, "n": torch.nan, ".": 1.0}[step])
        assert scaler.accepts(norm) == (step == ".")
        scales.append(scaler.scale)
    assert scaler.skipped_steps == len(norms) - norms.count(".")
    return scales


def test_the_scale_halves_after_the_hysteresis_and_doubles_after_the_window() -> None:
    cfg = PrecisionConfig(fp16=True, initial_loss_scale=16.0, loss_scale_window=3, hysteresis=2, min_loss_scale=4.0)
    assert walk(cfg, "x.n...x.x") == [16, 16, 8, 8, 8, 16, 16, 16, 8]  # the window restored the hysteresis
    assert walk(cfg, "xxxxx...") == [16, 8, 4, 4, 4, 4, 4, 8]
    assert walk(cfg, "..x...") == [16, 16, 16, 16, 16, 32]  # an overflow begins the window anew
    assert walk(PrecisionConfig(fp16=True, loss_scale=64.0), "x..x") == [64.0] * 4


def test_an_overflow_is_expected_while_the_scale_can_fall() -> None:
    scaler = LossScaler.of(PrecisionConfig(fp16=True, initial_loss_scale=8.0, min_loss_scale=4.0, hysteresis=1))
    assert scaler.expects_overflow
    scaler.accepts(torch.tensor(torch.inf))
    assert scaler.scale == 4.0 and not scaler.expects_overflow
    assert not LossScaler.of(PrecisionConfig(fp16=True, loss_scale=8.0)).expects_overflow
    assert not LossScaler.of(PrecisionConfig(bf16=True)).expects_overflow


def test_without_fp16_nothing_is_scaled_or_waited_for() -> None:
    scaler = LossScaler.of(PrecisionConfig(bf16=True))
    assert scaler.scale == 1.0 and scaler.accepts(torch.empty((), device="meta"))  # reading it would raise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True, "bf16": True}, "fp16 and bf16"),
        ({"attention_softmax_in_fp32": False}, "in fp32 only"),
        ({"loss_scale": 0.0}, r"loss_scale \(0.0\) must be positive"),
        ({"hysteresis": 0}, r"hysteresis \(0\)"),
        ({"min_loss_scale": 8.0, "initial_loss_scale": 4.0}, r"\(8.0\) must not exceed initial_loss_scale \(4.0\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_precision(PrecisionConfig(**options))


def overflow_twice(mesh: Mesh, cfg: Config) -> list[float]:
    """Steps 2 and 3 get an infinite gradient on the last rank alone; the scales of all steps."""
    run = tiny_run(mesh, cfg)
    finish, spoilt = run.buffers.finish, [False]

    def finish_spoilt() -> torch.Tensor:
        if spoilt[0] and mesh.dp.is_last:
            run.buffers.grads[7] = torch.inf
        return finish()

    run.buffers.finish = finish_spoilt
    scales = []
    for step in range(1, 6):
        spoilt[0] = step in (2, 3)
        before = [x.clone() for x in (run.buffers.params, run.optimizer.master, run.optimizer.exp_avg.flat)]
        stats = train_step(run, step)
        run.buffers.wait_params()
        after = (run.buffers.params, run.optimizer.master, run.optimizer.exp_avg.flat)
        same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert same == [spoilt[0]] * 3, f"step {step}: {same}"
        assert torch.isfinite(stats.by_source).all() and torch.isfinite(stats.grad_norm) != spoilt[0]
        assert run.optimizer.num_steps == step - stats.skipped_steps
        scales.append(stats.loss_scale)
    assert run.loss_scaler.scale == scales[-1] and run.loss_scaler.skipped_steps == 2
    return scales


def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "llama", fp16=True, initial_loss_scale=2.0**14, overlap_grad_reduce=False, **SMALL)
    for scales in run_ranks(overflow_twice, cfg, dp=2):
        assert scales == [2.0**14] * 3 + [2.0**13] * 2


def losses(mesh: Mesh, cfg: Config) -> dict[str, list[float]]:
    run = tiny_run(mesh, cfg)
    stats = [train_step(run, step) for step in range(1, 11)]
    sums = [s.by_source.sum(1) for s in stats]
    assert run.loss_scaler.skipped_steps == 0
    moments = [run.optimizer.global_norm(x.flat).item() for x in (run.optimizer.exp_avg, run.optimizer.exp_avg_sq)]
    norms = [s.grad_norm.item() for s in stats]
    return {"losses": [(s / c).item() for s, c in sums], "norms": norms, "moments": moments}


def test_losses_and_norms_are_near_those_of_fp32(tmp_path: Path) -> None:
    options = SMALL | {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "fp32_residual_connection": True,
    }
    exact = losses(single_process_mesh(), tiny_config(tmp_path, "gpt2", **SMALL))
    cfg = tiny_config(tmp_path, "gpt2", fp16=True, initial_loss_scale=2.0**14, sequence_parallel=True, **options)
    half = run_ranks(losses, cfg, tp=2, pp=2)[0]
    eps = torch.finfo(torch.float16).eps
    assert half["losses"] == pytest.approx(exact["losses"], rel=eps)
    assert half["norms"] == pytest.approx(exact["norms"], rel=16 * eps)
    assert half["moments"] == pytest.approx(exact["moments"], rel=16 * eps)  # AdamW's step alone would hide the scale


def rows(folder: Path) -> list[dict[str, Any]]:
    kept = ("step", "loss", "grad_norm", "loss_scale", "skipped_steps")
    return [{k: json.loads(line)[k] for k in kept} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_resumed_between_overflows_is_bit_equal(tmp_path: Path) -> None:
    def cfg(name: str, **options: Any) -> Config:
        # Too large a scale at first: the first steps overflow by themselves.
        # They are no trouble: the run does not end after two in a row.
        scaling = {"fp16": True, "initial_loss_scale": 2.0**27, "loss_scale_window": 3, "max_skipped_steps": 2}
        return tiny_config(tmp_path, "gpt2", 12, run_dir=str(tmp_path / name), **scaling, **SMALL, **options)

    expected = run_ranks(run_to_end, cfg("straight"))[0]
    straight = rows(tmp_path / "straight")
    assert 2 < straight[-1]["skipped_steps"] < 10 and straight[0]["grad_norm"] is None
    resumed = {}
    for interval in (2, 7, None):
        resumed = run_ranks(run_to_end, cfg("parts", exit_interval=interval))[0]
    assert rows(tmp_path / "parts") == straight
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    reader = CheckpointReader.open(tmp_path / "parts")
    assert reader.dtype == torch.float16 and reader.get("final_norm.weight").dtype == torch.float16
    path = reader.folder / "state.json"
    for state in ({"skipped_steps": 13}, {"skipped_steps": 0, "scale": -1.0, "good_steps": 0, "overflows_left": 0}, 3):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"loss_scaler": state}))
        reseal(reader.folder)
        with pytest.raises(CheckpointError, match="'loss_scaler' is no state"):
            _ = CheckpointReader.open(tmp_path / "parts").loss_scaler
