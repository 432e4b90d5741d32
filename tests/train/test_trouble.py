"""Steps that are not finite change nothing on any rank and say where; spikes are found by what was usual before."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_run import fake_run
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from tiny_runs import VOCAB, reseal, tiny_config, tiny_prepared, tiny_run, whole_state

from megapoly.checkpoint.load import CheckpointReader
from megapoly.checks import check
from megapoly.config import load_config
from megapoly.errors import CheckpointError, ConfigError, Echo, TroubleError
from megapoly.optim.arrears import Arrears
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config, ResilienceConfig
from megapoly.train.loop import train
from megapoly.train.prepare import resolve
from megapoly.train.setup import Run, build_run
from megapoly.train.step import train_step
from megapoly.train.trouble import Past

SMALL = {"hidden_size": 48, "ffn_hidden_size": 64, "ddp_bucket_size": 20_000}


def poison(run: Run, names: tuple[str, ...], value: float = math.nan) -> None:
    """From now on the gradients of some parameters get an entry that is not finite, on the rank that owns it."""
    finish = run.buffers.finish

    def finish_poisoned() -> torch.Tensor:
        owned = finish()
        for segment in run.buffers.segments:
            if segment.name in names and segment.owned[0] < segment.owned[1]:
                owned[segment.owned[1] - 1] = value
        return owned

    run.buffers.finish = finish_poisoned


def steps_with_trouble(mesh: Mesh, cfg: Config, names: tuple[str, ...]) -> dict[str, Any]:
    """Step 1, then 2 and 3 poisoned, then 4 and 5: the state at the end, what the watch noted and what was counted."""
    run = tiny_run(mesh, cfg)
    train_step(run, 1)
    finish = run.buffers.finish
    poison(run, names)
    for step in (2, 3):
        run.buffers.wait_params()
        own = (run.buffers.params, run.optimizer.master, run.optimizer.exp_avg.flat, run.optimizer.exp_avg_sq.flat,
               run.optimizer.momentum.flat)  # fmt: skip
        before = [x.clone() for x in own]
        stats = train_step(run, step)
        run.buffers.wait_params()
        assert all(map(torch.equal, before, own)), f"step {step}"
        assert not stats.grad_norm.isfinite() and stats.by_source.isfinite().all()
    run.buffers.finish = finish
    for step in (4, 5):
        train_step(run, step)
    run.watch.settle()
    notes = {str(step): note for step, note in run.watch.notes.items()}
    counted = [run.optimizer.num_steps, run.watch.skipped_steps, run.watch.skipped_in_a_row]
    return {"state": whole_state(run), "notes": notes, "counted": counted}


def without_trouble(mesh: Mesh, cfg: Config) -> dict[str, torch.Tensor]:
    run = tiny_run(mesh, cfg)
    for step in (1, 4, 5):
        train_step(run, step)
    return whole_state(run)


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "options"),
    [
        (1, 1, 1, {}),
        (2, 1, 2, {"sequence_parallel": True, "bf16": True}),
        (1, 2, 2, {"optimizer": "muon", "bf16": True}),
    ],
)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(
    tp: int, pp: int, dp: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Bit for bit, bias corrections included; the first parameter of the model is named, whoever owns it."""
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    cfg = tiny_config(tmp_path, "llama", **SMALL, **layout, **options)
    ranks = {"tp": tp, "pp": pp, "dp": dp}
    expected = run_ranks(without_trouble, cfg, **ranks)[0]
    bad = ("final_norm.weight", "layers.2.attention.output.weight", "layers.1.mlp.up.weight")
    for result in run_ranks(steps_with_trouble, cfg, bad, **ranks):
        assert result["counted"] == [3, 2, 0]
        assert list(result["notes"]) == ["2", "3"]
        for note in result["notes"].values():
            assert "first of layers.1.mlp.up.weight (loss 6." in note and "update is not taken" in note
        assert result["state"].keys() == expected.keys()
        for name, tensor in result["state"].items():
            assert torch.equal(tensor, expected[name]), name


def test_a_loss_that_is_not_finite_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(single_process_mesh(), tiny_config(tmp_path, "llama", **SMALL))
    train_step(run, 1)
    before = whole_state(run)

    def infinite(_: Run, by_source: torch.Tensor) -> torch.Tensor:
        by_source[0, 1] = math.inf
        return by_source

    monkeypatch.setattr("megapoly.train.step.sum_over_stages", infinite)
    assert train_step(run, 2).grad_norm.isfinite()
    run.watch.settle()
    assert run.watch.notes[2].startswith("the loss is not finite; the update is not taken")
    assert run.optimizer.num_steps == 1
    after = whole_state(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_norm_beyond_fp32_is_told_from_an_entry(tmp_path: Path) -> None:
    run = tiny_run(single_process_mesh(), tiny_config(tmp_path, "llama", **SMALL))
    poison(run, ("final_norm.weight",), 1e30)
    train_step(run, 1)
    run.watch.settle()
    assert "norm is beyond fp32" in run.watch.notes[1] and run.optimizer.num_steps == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_whatever_is_not_finite_in_a_gradient_is_found(value: float, tmp_path: Path) -> None:
    run = tiny_run(single_process_mesh(), tiny_config(tmp_path, "llama", **SMALL))
    poison(run, ("final_norm.weight", "layers.1.mlp.down.weight"), value)
    train_step(run, 1)
    run.watch.settle()
    assert "first of layers.1.mlp.down.weight" in run.watch.notes[1]


@pytest.mark.parametrize("policy", ["rollback", "skip"])
def test_a_step_has_the_host_wait_for_nothing_that_it_computes(policy: str) -> None:
    """On tensors without storage each look from the host is an error; what steps before it left is given."""
    flags = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "bf16": True, "spike_policy": policy}
    cfg = resolve(load_config("tiny", flags), has_cuda=True)
    for rank in (0, 7):
        with (
            fake_run(cfg, VOCAB, 8, rank) as run,
            patch.object(Arrears, "read", lambda self: [1.0] * self._copy.numel()),
        ):
            for step in (1, 2, 3):
                stats = train_step(run, step)
            assert len(run.watch.losses.values) == 2
            with pytest.raises(RuntimeError, match="meta"):
                stats.grad_norm.item()


def too_many(mesh: Mesh, cfg: Config) -> list[Any]:
    run = tiny_run(mesh, cfg)
    for step in range(1, 4):
        train_step(run, step)
    poison(run, ("layers.0.attention.qkv.weight",))
    try:
        for step in range(4, 20):
            train_step(run, step)
    except (TroubleError, Echo) as error:
        return [type(error).__name__, step, str(error)]
    return []


def test_a_run_ends_after_too_many_in_a_row_in_one_line_of_one_rank(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "llama", max_skipped_steps=3, **SMALL)
    ends = run_ranks(too_many, cfg, dp=2)
    # Steps 4 to 6 are not taken; in step 7 the host knows.
    assert [end[:2] for end in ends] == [["TroubleError", 7], ["Echo", 7]]
    assert (
        "first of layers.0.attention.qkv.weight" in ends[0][2] and "3 steps in a row (max_skipped_steps)" in ends[0][2]
    )
    assert run_ranks(too_many, tiny_config(tmp_path, "llama", max_skipped_steps=0, **SMALL)) == [[]]


def swell(run: Run, factors: dict[int, float]) -> None:
    """Gradients of some steps come out so many times as large."""
    finish, step = run.buffers.finish, run.optimizer.num_steps + run.watch.skipped_steps

    def finish_swollen() -> torch.Tensor:
        nonlocal step
        step += 1
        return finish().mul_(factors.get(step, 1.0))

    run.buffers.finish = finish_swollen


def spiking(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    run = tiny_run(mesh, cfg)
    swell(run, {8: 1000.0})
    train(run)
    return {"state": whole_state(run), "num_steps": run.optimizer.num_steps}


def rows(cfg: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(cfg.logging.run_dir, "metrics.jsonl").read_text().splitlines()]


def left_alone(mesh: Mesh, cfg: Config, skipped: int) -> dict[str, torch.Tensor]:
    run = tiny_run(mesh, cfg)
    for step in range(1, 13):
        if step != skipped:
            train_step(run, step)
    return whole_state(run)


@pytest.mark.parametrize("policy", ["off", "warn", "skip"])
def test_a_spike_of_the_gradient_norm_meets_its_policy(
    policy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The 8th step's gradients are 1000 times too large."""
    cfg = tiny_config(tmp_path, "llama", 12, spike_policy=policy, spike_window=8, log_interval=5, **SMALL)
    for result in run_ranks(spiking, cfg, dp=2):
        assert result["num_steps"] == (11 if policy == "skip" else 12)
    noted = {row["step"]: row["trouble"] for row in rows(cfg) if "trouble" in row}
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("  step 8: ")]
    if policy == "off":
        assert not noted and not said
        return
    assert list(noted) == [8] and said == [f"  step 8: {noted[8]}"]
    assert noted[8].startswith("the gradient norm is ") and ("not taken" in noted[8]) == (policy == "skip")
    if policy == "skip":
        expected = run_ranks(left_alone, cfg, 8, dp=2)[0]
        for name, tensor in result["state"].items():
            assert torch.equal(tensor, expected[name]), name


def test_a_spike_of_the_loss_is_warned_of(tmp_path: Path) -> None:
    run = tiny_run(single_process_mesh(), tiny_config(tmp_path, "llama", spike_window=8, **SMALL))
    for step in range(1, 6):
        train_step(run, step)
    with torch.no_grad():
        run.buffers.params.mul_(4.0)
    train_step(run, 6)
    run.watch.settle()
    assert run.watch.notes[6].startswith("the loss is ") and run.optimizer.num_steps == 6


def watched_run(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    """Train to the end or exit_interval, resuming, with one swollen step; what the watch knows then."""
    prepared = tiny_prepared(cfg)
    if Path(cfg.logging.run_dir, "checkpoints/latest").exists():
        checkpoint = CheckpointReader.open(cfg.logging.run_dir)
        prepared = dataclasses.replace(prepared, checkpoint=checkpoint, is_resume=True)
    run = build_run(prepared, mesh)
    swell(run, {8 - prepared.start_step: 1000.0})
    train(run)
    return {"watch": run.watch.state(), "state": whole_state(run), "num_steps": run.optimizer.num_steps}


def test_a_resumed_run_remembers_what_was_usual(tmp_path: Path) -> None:
    def cfg(name: str, **options: Any) -> Config:
        return tiny_config(
            tmp_path, "llama", 10, run_dir=str(tmp_path / name), spike_policy="skip", spike_window=8, **SMALL, **options
        )

    expected = run_ranks(watched_run, cfg("straight"))[0]
    assert expected["watch"]["skipped_steps"] == 1
    for kept, key in (("losses", "loss"), ("norms", "grad_norm")):
        assert expected["watch"][kept] == pytest.approx([row[key] for row in rows(cfg("straight"))[-8:]])
    run_ranks(watched_run, cfg("parts", exit_interval=6))
    run_ranks(watched_run, cfg("parts", exit_interval=8))  # right after the step whose update is not taken
    resumed = run_ranks(watched_run, cfg("parts"))[0]
    assert resumed["watch"] == expected["watch"] and resumed["num_steps"] == expected["num_steps"] == 9
    for name, tensor in expected["state"].items():
        assert torch.equal(resumed["state"][name], tensor), name
    path = CheckpointReader.open(tmp_path / "parts").folder / "state.json"
    for watch in (3, {"losses": []}, expected["watch"] | {"norms": [1.0, None]}, expected["watch"] | {"losses": "12"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"watch": watch}))
        reseal(path.parent)
        with pytest.raises(CheckpointError, match="'watch' is no state"):
            _ = CheckpointReader.open(tmp_path / "parts").watch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spike_threshold": 0.0}, r"spike_threshold \(0.0\) must be positive"),
        ({"spike_window": 3}, r"spike_window \(3\)"),
        ({"rollback_batches": 0}, r"rollback_batches \(0\)"),
        ({"max_skipped_steps": -1}, r"max_skipped_steps \(-1\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tiny_config(tmp_path, "gpt2", **options), 1)


@given(st.lists(st.floats(1.0, 2.0), min_size=8, max_size=16), st.floats(0.0, 1.0))
def test_the_limit_is_robust_and_goes_with_the_values(values: list[float], place: float) -> None:
    """One wild value among them hardly moves it; scaled values scale it."""

    def limit(values: list[float]) -> float:
        past = Past(ResilienceConfig(spike_window=16, spike_threshold=10.0))
        past.values.extend(values)
        return past.limit

    usual = limit(values)
    assert max(1.01, sorted(values)[len(values) // 2 - 1]) <= usual <= 2.0 + 10 * 1.4826 * 0.5
    wild = [*values]
    wild[int(place * (len(values) - 1))] = 1e9
    assert limit(wild) <= 2.0 + 10 * 1.4826 * 1.0
    assert limit([4 * value for value in values]) == pytest.approx(4 * usual)
    assert limit(values[:7]) == math.inf


def test_flat_values_have_a_limit_all_the_same() -> None:
    past = Past(ResilienceConfig(spike_window=8, spike_threshold=10.0))
    past.values.extend([3.0] * 8)
    assert past.limit == pytest.approx(3.0 * 1.1)
    past.values.extend([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert past.limit == pytest.approx(4.5 + 10 * 1.4826 * 2.0)
