"""Stages with batches, sequences, rates and an optimizer of their own: one table, and any resume is the same run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import VOCAB, run_to_end, tiny_config, tiny_prepared, tiny_run

from megapoly.checks import check
from megapoly.errors import CheckpointError, ConfigError
from megapoly.model.count import flops_per_token
from megapoly.optim.schedule import check_phases, learning_rate, phases_of, rate_at
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config, ScheduleConfig
from megapoly.train.loop import train
from megapoly.train.main import dry_run
from megapoly.train.prepare import Prepared, with_start
from megapoly.train.setup import build_run

# Blocks of 32 tokens: 20 in two sequences each, 18 whole (the last batch is cut short), 12 in four each.
STAGES: list[dict[str, Any]] = [
    {"name": "short", "tokens": 640, "non_english_share": {"from": 0.2, "to": 0.8}, "seq_length": 16},
    {"name": "long", "tokens": 576, "non_english_share": 0.6, "seq_length": 32, "global_batch_size": 4},
    {"name": "last", "tokens": 384, "weights": {"en": 1.0}, "seq_length": 8, "lr": 5e-4, "lr_warmup_iters": 2,
     "lr_decay_style": "linear", "reset_optimizer": True},
]  # fmt: skip
SAMPLES = [4, 8, 12, 16, 20, 24, 28, 32, 36, 38, 40, 42, 44, 46, 48, 50]
NAMES = ["short"] * 5 + ["long"] * 5 + ["last"] * 6


def staged(folder: Path, name: str = "run", stages: list[dict[str, Any]] = STAGES, **leaves: Any) -> Config:
    run_dir = str(folder / name)
    return tiny_config(
        folder, "gpt2", stages=stages, max_position_embeddings=32, num_layers=2, run_dir=run_dir, **leaves
    )


def rows(cfg: Config) -> list[dict[str, Any]]:
    text = Path(cfg.logging.run_dir, "metrics.jsonl").read_text()
    timed = ("seconds", "tokens_per_second", "tflops", "mfu", "probe", "loading")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in text.splitlines()]


def test_one_table_drives_data_and_optimization_and_resumes_bit_equal(tmp_path: Path) -> None:
    straight = staged(tmp_path, "straight")
    expected = run_ranks(run_to_end, straight, dp=2)[0]
    found = rows(straight)
    assert [row["samples"] for row in found] == SAMPLES and [row["stage"] for row in found] == NAMES
    assert [sum(row["tokens_by_source"].values()) for row in found] == [
        32 * (b - a) for a, b in zip([0, *SAMPLES], SAMPLES, strict=False)
    ]
    first = [learning_rate(straight.schedule, step, 10) for step in range(1, 11)]
    own = ScheduleConfig(lr=5e-4, lr_warmup_iters=2, lr_warmup_init=first[-1], lr_decay_style="linear")
    assert [row["lr"] for row in found] == first + [learning_rate(own, step, 6) for step in range(1, 7)]
    resumed = {}
    for interval in (3, 7, 10, 11, None):  # within a stage, within the next, at the reset's border and after it
        resumed = run_ranks(run_to_end, staged(tmp_path, "parts", exit_interval=interval), dp=2)[0]
    assert rows(staged(tmp_path, "parts")) == found
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), f"{name} differs after resuming"


def test_stages_train_alike_on_every_layout(tmp_path: Path) -> None:
    run_ranks(run_to_end, staged(tmp_path, "alone"))
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    run_ranks(run_to_end, staged(tmp_path, "together", **layout), tp=2, pp=2)
    for mine, theirs in zip(rows(staged(tmp_path, "together")), rows(staged(tmp_path, "alone")), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["tokens_by_source"] == theirs["tokens_by_source"]


def updates(mesh: Mesh, cfg: Config) -> list[tuple[int, bool]]:
    """Before each update: how many the moments have seen, and whether there are any."""
    run = tiny_run(mesh, cfg)
    seen: list[tuple[int, bool]] = []
    step = run.optimizer.step

    def noting(*args: Any) -> None:
        seen.append((run.optimizer.num_steps, bool(run.optimizer.exp_avg.flat.any())))
        step(*args)

    run.optimizer.step = noting  # type: ignore[method-assign]
    train(run)
    return seen


def test_a_stage_that_resets_the_optimizer_begins_without_moments(tmp_path: Path) -> None:
    counts = [*range(10), *range(6)]
    assert run_ranks(updates, staged(tmp_path))[0] == [(n, n > 0) for n in counts]


# ------------------------------------------------------------------------------------------------ rates


def test_a_stage_without_a_rate_goes_on_with_the_schedule_that_runs() -> None:
    base = ScheduleConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10)
    plain = phases_of(base, [("a", 1, {}), ("b", 51, {"global_batch_size": 4})], 100)
    assert [rate_at(plain, step) for step in range(1, 101)] == [learning_rate(base, s, 100) for s in range(1, 101)]


def test_a_stage_with_a_rate_begins_a_schedule_up_to_the_next_that_does() -> None:
    base = ScheduleConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10, lr_decay_iters=30)
    stages = [("a", 1, {"lr": 2.0}), ("b", 51, {"lr": 0.5}), ("c", 61, {}), ("d", 81, {"lr_decay_style": "constant"})]
    phases = phases_of(base, stages, 100)
    check_phases(phases)
    assert [(p.first_step, p.num_steps) for p in phases] == [(1, 50), (51, 30), (81, 20)]
    assert rate_at(phases, 10) == 2.0 and rate_at(phases, 30) == rate_at(phases, 50) == 0.1  # lr_decay_iters is a's
    assert 0.49 < rate_at(phases, 51) < 0.5  # no second warm-up unless it is asked for
    assert rate_at(phases, 61) < rate_at(phases, 60) and rate_at(phases, 80) == 0.1  # through c to its end
    assert {rate_at(phases, step) for step in range(81, 101)} == {1.0}
    again = phases_of(base, [("a", 1, {}), ("b", 51, {"lr": 0.5, "lr_warmup_iters": 4})], 100)
    assert rate_at(again, 51) == pytest.approx(0.1 + 0.4 / 4) and rate_at(again, 54) == 0.5  # from where a ended
    cut_short = phases_of(base, stages, 40)  # train_iters: the later stages are never reached
    assert [(p.first_step, p.num_steps) for p in cut_short] == [(1, 40)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -1.0}, r"stage 'b': lr \(-1.0\) must be a finite number"),
        ({"lr": 0.05}, r"stage 'b': min_lr \(0.1\) must not exceed lr \(0.05\)"),
        ({"lr_warmup_iters": 7, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 4}, "stage 'b': lr_wsd_decay_iters .4."),
    ],
)
def test_rates_that_cannot_be_are_refused_with_the_stage(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_phases(phases_of(ScheduleConfig(lr=1.0, min_lr=0.1), [("a", 1, {}), ("b", 11, given)], 20))


def test_the_dry_run_tells_work_and_memory_of_the_longest_sequences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = tiny_prepared(staged(tmp_path))
    dry_run(prepared, 1)
    told = capsys.readouterr().out
    works = [flops_per_token(dataclasses.replace(prepared.cfg.model, seq_length=n), VOCAB) / 1e9 for n in (16, 32, 8)]
    parts = ", ".join(f"{work:.4g} in sequences of {n}" for work, n in zip(works, (16, 32, 8), strict=True))
    assert f"; {parts} GFLOP a token" in told and len(set(works)) == 3
    assert "memory a rank in stage 'long' with sequences of 32: " in told
    dry_run(tiny_prepared(tiny_config(tmp_path, "gpt2")), 1)
    assert " in sequences of" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "options", "world", "message"),
    [
        ({"global_batch_size": 6}, {}, 4, r"^stage 'long': global_batch_size \(6\) must be a multiple of .* = 4"),
        ({"global_batch_size": 0}, {}, 1, r"^stage 'long': global_batch_size \(0\) must be positive"),
        ({"lr": -1.0}, {}, 1, r"^stage 'long': lr \(-1.0\) must be a finite number of at least 0"),
        ({"lr": 1e-5, "min_lr": 1e-4}, {}, 1, r"^stage 'long': min_lr \(0.0001\) must not exceed lr \(1e-05\)"),
        ({"seq_length": 12}, {}, 1, r"^stage 'long': seq_length \(12\) must divide block_length \(16\).* 12 or 24 would"),
        ({"seq_length": 64}, {}, 1, r"^stage 'long': max_position_embeddings \(32\) must be at least seq_length \(64\)"),
        ({"seq_length": 4, "global_batch_size": 6}, {}, 1, r"6\) must be a multiple of 4, the sequences of 4 tokens in a block of 16: 4 or 8"),
        ({"seq_length": 2}, {"context_parallel_size": 2}, 2, r"^stage 'long': context_parallel_size \(2\) cuts .* 4 chunks"),
        ({"seq_length": 1, "global_batch_size": 16}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2,
         r"^stage 'long': sequence_parallel: tensor_model_parallel_size \(2\) must divide"),
    ],
)  # fmt: skip
def test_stages_that_the_layout_cannot_have_are_refused_at_once(
    change: dict[str, Any], options: dict[str, Any], world: int, message: str, tmp_path: Path
) -> None:
    stages = [{"name": "one", "tokens": 640, "non_english_share": 0.3}, STAGES[1] | {"seq_length": None} | change]
    with pytest.raises(ConfigError, match=message):
        check(staged(tmp_path, stages=stages, **options), world)


def test_a_stage_with_nothing_but_a_wrong_rate_of_its_own_is_named(tmp_path: Path) -> None:
    stages = [{"name": "one", "tokens": 640, "non_english_share": 0.3, "min_lr": 0.1}]
    with pytest.raises(ConfigError, match=r"^stage 'one': min_lr \(0.1\) must not exceed lr \(0.001\)"):
        check(staged(tmp_path, stages=stages), 1)


def test_a_ramp_up_must_end_before_a_stage_has_batches_of_its_own(tmp_path: Path) -> None:
    stages = [{"name": "one", "tokens": 640, "non_english_share": 0.3}, STAGES[1] | {"seq_length": None}]
    fits = tiny_prepared(staged(tmp_path, stages=stages, rampup_batch_size=[2, 2, 40]))
    assert [fits.samples_after(n) for n in range(13)][:3] == [0, 2, 4] and fits.batch_sizes.at(40) == 4
    with pytest.raises(ConfigError, match="rampup_batch_size 2,2,41 must end before the first stage with"):
        tiny_prepared(staged(tmp_path, stages=stages, rampup_batch_size=[2, 2, 41]))


def starting_point(cfg: Config) -> None:
    going_on(cfg)


def test_what_has_begun_keeps_its_sequences_batches_and_reset(tmp_path: Path) -> None:
    run_ranks(run_to_end, staged(tmp_path, exit_interval=7))
    starting_point(staged(tmp_path))
    short, long, last = STAGES
    free = {"seq_length": 32, "lr": 1e-4, "reset_optimizer": False, "non_english_share": 0.5, "weights": None}
    starting_point(
        staged(tmp_path, stages=[short | {"name": "renamed"}, long | {"tokens": 640, "lr": 1e-4}, last | free])
    )
    for changed, message in (
        ([short | {"seq_length": 32}, long, last], "stage 'short': seq_length was 16 and is 32"),
        ([short | {"non_english_share": 0.3}, long, last],
         r"'short' had 0.29 to 0.695 non-English and has 0.3 .* end stage 'long' at tokens 256 and append"),
        ([short, long | {"reset_optimizer": True}, last], "stage 'long': reset_optimizer was not given and is True"),
        ([short, long | {"global_batch_size": 8}, last], "stage 'long': global_batch_size was 4 and is 8"),
        ([short, long | {"non_english_share": 0.7}, last],
         r"stage 'long' had 0.6 non-English and has 0.7 \(shares: 'en' 0.4 -> 0.3, 'ko' 0.6 -> 0.7\) "
         r"\(a change from here on: end stage 'long' at tokens 256 and append a stage\)"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            starting_point(staged(tmp_path, stages=changed))
    with pytest.raises(CheckpointError, match="28 samples came in batches of 4, .*, not of 8"):
        starting_point(
            dataclasses.replace(cfg := staged(tmp_path), train=dataclasses.replace(cfg.train, global_batch_size=16))
        )


def test_a_plan_changed_for_what_is_to_come_goes_on_and_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(run_to_end, staged(tmp_path, exit_interval=7))
    short, long, last = STAGES
    changed = staged(tmp_path, stages=[short, long, last | {"weights": {"ko": 1.0}, "lr": 2e-4}])
    prepared = going_on(changed)
    assert {str(change).split(" (")[0] for change in prepared.changes} == {
        "stage 'last' had 0 non-English and has 1", "stage 'last': lr was 0.0005 and is 0.0002",
    }  # fmt: skip
    before = rows(changed)
    capfd.readouterr()
    run_ranks(go_on, changed)
    assert "the plan changed for what is to come: stage 'last' had 0 non-English" in capfd.readouterr().out
    after = rows(changed)
    assert after[:7] == before and [row["samples"] for row in after] == SAMPLES
    assert all(set(row["tokens_by_source"]) == {"ko"} for row in after[10:])


def going_on(cfg: Config) -> Prepared:
    prepared = with_start(tiny_prepared(cfg), {})
    assert prepared.is_resume
    return prepared


def go_on(mesh: Mesh, cfg: Config) -> None:
    train(build_run(going_on(cfg), mesh))
