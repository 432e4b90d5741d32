"""One step again, on any layout: equal to its row, or what differs; the first output and gradient that is not finite."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import VOCAB, tiny_config, tiny_prepared, tiny_run

from megapoly.errors import ConfigError
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.loop import train
from megapoly.train.main import parse
from megapoly.train.prepare import Prepared, prepare, with_start
from megapoly.train.replay import Probe, compared, prepared_before, run_again
from megapoly.train.setup import build_run
from megapoly.train.step import train_step

STEPS = 8
SMALL = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "eval_iters": 1, "save_interval": 3}


def train_it(mesh: Mesh, cfg: Config) -> None:
    train(tiny_run(mesh, cfg))


def resumed(cfg: Config) -> Prepared:
    return with_start(tiny_prepared(cfg), {})


def replay_it(mesh: Mesh, cfg: Config, step: int) -> None:
    run = build_run(prepared_before(resumed(cfg), step), mesh)
    assert run_again(run, step)


@pytest.mark.parametrize("words", [["--replay", "7"], ["--replay=7"]])
def test_the_flag_takes_a_step(words: list[str]) -> None:
    asked = parse(["--config", "tiny", *words, "--lr", "1e-4"], "tiny", "tiny")
    assert (asked.replayed, asked.flags) == (7, {"lr": 1e-4})
    for bad in (["--replay"], ["--replay", "-1"], ["--replay=x"]):
        with pytest.raises(ConfigError, match="flag --replay needs a step"):
            parse(["--config", "tiny", *bad], "tiny", "tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_replayed_step_is_equal_to_its_row_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config(tmp_path, "gpt2", STEPS, **SMALL)
    run_ranks(train_it, cfg, dp=2)
    before = contents(tmp_path / "run")
    capfd.readouterr()
    for step, start in ((1, 0), (3, 0), (4, 3), (6, 3), (8, 6)):
        run_ranks(replay_it, cfg, step, dp=2)
        out = capfd.readouterr().out
        assert f"replaying step {step}, from step {start}" in out
        assert "equal to its row of metrics.jsonl" in out
        assert out.count("not finite: none") == 2
    assert contents(tmp_path / "run") == before
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[7])
    assert f"loss {row['loss']:.6g} (en {row['loss_by_source']['en']:.6g}, ko" in out
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    run_ranks(replay_it, tiny_config(tmp_path, "gpt2", STEPS, **SMALL, **layout), 6, tp=2, pp=2)
    out = capfd.readouterr().out
    assert "equal to its row" in out or all(float(part.split(")")[0]) < 1e-5 for part in out.split("(by ")[1:])


@pytest.mark.parametrize(("finetune", "start"), [(False, 6), (True, 0)])
def test_a_run_begun_with_another_ones_checkpoint_is_replayed_from_there(
    finetune: bool, start: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own first checkpoint is of step 8: steps before it begin with the weights that the run began with."""
    run_ranks(train_it, tiny_config(tmp_path, "gpt2", STEPS + 4, **SMALL | {"exit_interval": 6}))
    own = {"run_dir": str(tmp_path / "own"), "load": str(tmp_path / "run"), "save_interval": 8, "lr": 5e-4}
    cfg = tiny_config(tmp_path, "gpt2", STEPS + 4, **SMALL | own | {"finetune": finetune})
    run_ranks(start_it, cfg)
    capfd.readouterr()
    for step, before in ((7, start), (8, start), (9, 8)):
        run_ranks(start_it, cfg, step)
        out = capfd.readouterr().out
        other = tmp_path / ("run" if before < 8 else "own")
        assert f"replaying step {step}, from step {before} ({other}/checkpoints/step_" in out
        assert "equal to its row of metrics.jsonl" in out
    if not finetune:
        with pytest.raises(ConfigError, match=r"from 7 to 12: it began with .*run/checkpoints/step_00000006"):
            prepared_before(with_start(tiny_prepared(cfg), {}), 6)


def start_it(mesh: Mesh, cfg: Config, replayed: int | None = None) -> None:
    """Train as the command does, or replay a step."""
    prepared = with_start(tiny_prepared(cfg), {})
    if replayed is None:
        train(build_run(prepared, mesh))
    else:
        assert run_again(build_run(prepared_before(prepared, replayed), mesh), replayed)


def test_what_differs_is_named_with_both_values() -> None:
    again = {"loss": 2.0, "loss_by_source": {"en": 1.0, "ko": float("nan")}, "grad_norm": 3.0}
    row: dict[str, Any] = {"loss": 2.0, "loss_by_source": {"en": 1.0, "ko": None}, "grad_norm": 3.0}
    assert compared(again, row) == "equal to its row of metrics.jsonl"
    row |= {"loss": 4.0, "loss_by_source": {"en": None, "ko": 5.0}}
    assert compared(again, row) == (
        "differs from its row: loss was 4.0 and is 2.0 (by 0.5); loss_by_source of en was None and is 1.0; "
        "loss_by_source of ko was 5.0 and is None"
    )
    assert "no row of this step" in compared(again, None)


def test_another_layout_than_that_of_the_row_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = tiny_config(tmp_path, "gpt2", STEPS, **SMALL)
    run_ranks(train_it, cfg)
    rows = tmp_path / "run/metrics.jsonl"
    rows.write_text(rows.read_text().replace('"grad_norm": ', '"grad_norm": 1'))
    said = (
        "(it was made on TP 1 x CP 1 x PP 1 x DP 1, this is TP 1 x CP 1 x PP 1 x DP 2: sums are taken in another order)"
    )
    for ranks in (1, 2):
        run_ranks(start_it, cfg, 5, dp=ranks)
        out = capfd.readouterr().out
        assert "differs from its row: " in out and (said in out) == ("it was made on" in out) == (ranks == 2), out


def test_no_run_has_no_step_to_replay(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", STEPS, **SMALL | {"run_dir": str(tmp_path / "typo")})
    with pytest.raises(ConfigError, match="typo: no run to replay a step of"):
        prepared_before(with_start(tiny_prepared(cfg), {}), 3)


def test_a_dry_run_replays_nothing() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        parse(["--dry-run", "--replay", "2"], "tiny", "tiny")


def test_a_replay_does_not_ask_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config(tmp_path, "gpt2", STEPS, **SMALL)
    monkeypatch.setattr("megapoly.train.prepare.os.access", lambda *_: False)
    monkeypatch.setattr("megapoly.train.prepare.resolve_vocab_size", lambda _: (VOCAB, None))
    assert prepare(cfg, 1, False, writes=False).num_steps == STEPS
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(cfg, 1, False)


def probed(mesh: Mesh, cfg: Config, name: str) -> list[Any]:
    """A step with an entry of a parameter that is infinite on every rank that has it."""
    run = tiny_run(mesh, cfg)
    for segment in run.buffers.segments:
        if segment.name == name:
            run.buffers.params[segment.begin] = torch.inf
    probe = Probe(run)
    with probe.watching():
        train_step(run, 1)
    return [probe.first_layer(), probe.first_parameter()]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.1.attention.qkv.bias", "layers.1.attention.output"),  # one with the attention between
        ("layers.1.mlp_norm.bias", "layers.1.mlp_norm"),
        ("layers.0.mlp.down.bias", "layers.0.mlp.down"),
    ],
)
def test_the_first_layer_whose_output_is_not_finite_is_named(name: str, layer: str, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", pipeline_model_parallel_size=2, **SMALL)
    for first_layer, first_parameter in run_ranks(probed, cfg, name, pp=2):
        assert first_layer == layer
        assert first_parameter == "embedding.word.weight"  # gradients flow back to where the model begins


def norms(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    run = tiny_run(mesh, cfg)
    probe = Probe(run)
    with probe.watching():
        stats = train_step(run, 1)
    return {
        "largest": dict(probe.largest(1.0)),
        "whole": probe.norms.sum().sqrt().item(),
        "norm": stats.grad_norm.item(),
    }


def test_norms_by_parameter_are_those_of_one_process_and_make_up_the_whole(tmp_path: Path) -> None:
    alone = run_ranks(norms, tiny_config(tmp_path, "gpt2", **SMALL))[0]
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for norms_of in run_ranks(norms, tiny_config(tmp_path, "gpt2", **SMALL, **layout), tp=2, dp=2):
        assert norms_of["largest"] == pytest.approx(alone["largest"], rel=1e-4)
        assert norms_of["whole"] == pytest.approx(norms_of["norm"], rel=1e-5)
    assert len(alone["largest"]) == 10 and max(alone["largest"].values()) < alone["norm"]


def test_a_step_that_was_rolled_back_is_replayed_with_its_data(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", STEPS, **SMALL)
    run_ranks(train_it, cfg)
    (tmp_path / "run/checkpoints/rollbacks.json").write_text(
        '[{"step": 8, "why": "", "to": 6, "begin": 48, "end": 60}]'
    )
    # Its last checkpoints are of a future that was given up: 6 is the last of the run's own.
    (tmp_path / "run/checkpoints/latest").write_text("step_00000006")
    prepared = resumed(cfg)
    assert prepared.plan.left_out == ((48, 60),) and prepared.leaves_out(7) and not prepared.leaves_out(8)
    for step, start in ((7, 6), (8, 6), (6, 3), (2, 0)):
        before = prepared_before(prepared, step)
        assert before.start_step == start and not before.leaves_out(step)
    assert prepared_before(prepared, 6).plan.left_out == ((48, 60),)
    # Of step 8 the second half was trained on, after no step 7: so it is again.
    assert prepared_before(prepared, 8).plan.left_out == ((48, 60),) and prepared_before(prepared, 8).leaves_out(7)
    # Of another rollback, whose gap begins before the checkpoint of step 6: that has seen other samples.
    further = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, left_out=((24, 32),)))
    assert prepared_before(further, 7).start_step == 3 and prepared_before(further, 4).plan.left_out == ()
    for step in (0, STEPS + 1):
        with pytest.raises(ConfigError, match=r"must be a step of the run, from 1 to 8"):
            prepared_before(prepared, step)
