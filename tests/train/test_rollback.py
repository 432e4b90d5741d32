"""After a spike a run goes back, leaves out the data around it, and is as if the plan had never had it."""

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from tiny_runs import tiny_config, tiny_prepared, whole_state

from megapoly.checkpoint import folders
from megapoly.checkpoint.folders import step_folders
from megapoly.checkpoint.load import CheckpointReader
from megapoly.checkpoint.rollbacks import NAME, Rollback, read_rollbacks, write_rollbacks
from megapoly.checkpoint.save import Saver
from megapoly.data.curriculum import united
from megapoly.data.plan_changes import plan_changes
from megapoly.data.realised import without_times
from megapoly.errors import CheckpointError, Echo, TroubleError
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config
from megapoly.train import rollback
from megapoly.train.loop import train
from megapoly.train.prepare import with_start
from megapoly.train.setup import Run, build_run
from megapoly.train.step import train_step

STEPS = 16
write_shard = Saver._write_shard


def config(folder: Path, name: str, **options: Any) -> Config:
    usual = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "eval_iters": 1, "save_interval": 3}
    usual |= {"spike_policy": "rollback", "spike_window": 8, "rollback_steps": 2, "rollback_batches": 4}
    run_dir = str(folder / name)
    return tiny_config(folder, "llama", STEPS, run_dir=run_dir, **(usual | {"spike_threshold": 50.0} | options))


def go(mesh: Mesh, cfg: Config, spikes: tuple[int, ...], left_out: tuple[tuple[int, int], ...] = ()) -> dict[str, Any]:
    """Train to the end or exit_interval, resuming; the gradients of some steps come out 1000 times too large."""
    prepared = tiny_prepared(cfg)
    prepared = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, left_out=left_out))
    run = build_run(with_start(prepared, {}), mesh)
    finish, now = run.buffers.finish, 0

    def stepping(run: Run, step: int) -> Any:
        nonlocal now
        now = step
        return train_step(run, step)

    run.buffers.finish = lambda: finish().mul_(1000.0 if now in spikes else 1.0)
    with patch("megapoly.train.loop.train_step", stepping):
        assert train(run)
    return {"state": whole_state(run), "left_out": list(CheckpointReader.open(cfg.logging.run_dir).left_out)}


def rows(cfg: Config) -> list[dict[str, Any]]:
    text = Path(cfg.logging.run_dir, "metrics.jsonl").read_text()
    return [without_times(json.loads(line)) for line in text.splitlines()]


def test_a_run_rolled_back_is_as_if_the_plan_had_never_had_the_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A spike at step 9, checkpoints of steps 3 and 6 before it: back to 6, without the batches of steps 7 to 10."""
    cfg = config(tmp_path, "spiked")
    results = run_ranks(go, cfg, (9,), dp=2)
    out = capfd.readouterr().out
    assert [result["left_out"] for result in results] == [[(48, 80)]] * 2
    expected = run_ranks(go, config(tmp_path, "never"), (), ((48, 80),), dp=2)[0]
    for name, tensor in expected["state"].items():
        assert torch.equal(results[0]["state"][name], tensor), name
    assert rows(cfg) == rows(config(tmp_path, "never"))
    assert [row["step"] for row in rows(cfg)] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(cfg) if "left_out" in row] == [7, 8, 9, 10]
    assert [row["samples"] for row in rows(cfg)] == [8 * step for step in range(1, STEPS + 1)]
    (record,) = read_rollbacks(tmp_path / "spiked/checkpoints")
    assert dataclasses.replace(record, why="") == Rollback(step=9, why="", to=6, begin=48, end=80)
    assert record.why.startswith("the gradient norm is ")
    assert "  step 9: back to step 6; samples 48 to 80 are left out" in out
    assert out.count("samples 48 to 80 are left out (of 128) after a spike") == 1
    with pytest.raises(AssertionError):  # the data do matter
        plain = run_ranks(go, config(tmp_path, "plain"), (), dp=2)[0]
        assert all(torch.equal(expected["state"][name], plain["state"][name]) for name in expected["state"])


@pytest.mark.parametrize("stop", [7, 11])
def test_a_resume_after_a_rollback_leaves_out_the_same_on_any_layout(stop: int, tmp_path: Path) -> None:
    """Stopped right after going back (no checkpoint since), or at a later step; then on with the same or other ranks."""
    expected = run_ranks(go, config(tmp_path, "straight"), (9,))[0]
    if stop == 7:
        with (
            patch("megapoly.train.loop.Metrics.leave_out", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            run_ranks(go, config(tmp_path, "parts"), (9,))
    else:
        run_ranks(go, config(tmp_path, "parts", exit_interval=stop), (9,))
    assert CheckpointReader.open(tmp_path / "parts").step == (6 if stop == 7 else 11)
    saved = {folder.name for folder in (tmp_path / "parts/checkpoints").glob("step_*")}
    if stop == 7:
        assert saved == {"step_00000003", "step_00000006"}  # not step 9, where the spike was
    resumed = run_ranks(go, config(tmp_path, "parts"), ())[0]
    assert resumed["left_out"] == expected["left_out"] == [(48, 80)]
    for name, tensor in expected["state"].items():
        assert torch.equal(resumed["state"][name], tensor), name
    assert rows(config(tmp_path, "parts")) == rows(config(tmp_path, "straight"))
    assert CheckpointReader.open(tmp_path / "parts").left_out == ((48, 80),)


def test_a_kill_right_after_going_back_far_resumes_from_there(tmp_path: Path) -> None:
    """Back to step 3 though there is a checkpoint of step 6: from then on the run's newest is that of step 3."""
    expected = run_ranks(go, config(tmp_path, "straight", rollback_steps=4), (9,))[0]
    with (
        patch("megapoly.train.loop.introduce", side_effect=[None, KeyboardInterrupt]),
        pytest.raises(KeyboardInterrupt),
    ):
        run_ranks(go, config(tmp_path, "parts", rollback_steps=4), (9,))
    assert CheckpointReader.open(tmp_path / "parts").step == 3
    resumed = run_ranks(go, config(tmp_path, "parts", rollback_steps=4), ())[0]
    assert resumed["left_out"] == expected["left_out"] == [(48, 80)]
    for name, tensor in expected["state"].items():
        assert torch.equal(resumed["state"][name], tensor), name


def slowly(self: Saver, job: Any, mine: Any) -> None:
    time.sleep(0.5)
    write_shard(self, job, mine)


def test_a_save_under_way_does_not_outrun_a_rollback(tmp_path: Path) -> None:
    """The checkpoint of step 6 is still being written when the spike of step 7 takes the run back to step 3."""
    cfg = config(tmp_path, "run")
    with (
        patch.object(Saver, "_write_shard", slowly),
        patch("megapoly.train.loop.introduce", side_effect=[None, KeyboardInterrupt]),
        pytest.raises(KeyboardInterrupt),
    ):
        run_ranks(go, cfg, (7,))
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    root = tmp_path / "run/checkpoints"
    assert CheckpointReader.open(root).step == 3 and [folder.name for folder in step_folders(root)] == ["step_00000003"]


def test_saves_that_fail_before_and_after_a_rollback_are_in_a_row(tmp_path: Path) -> None:
    """Those of steps 6 and 7; at step 8 the run goes back to 5, leaves out 6 to 9, and the save of 10 is the third."""
    failed = []

    def failing(self: Saver, job: Any, mine: Any) -> None:
        if job.step > 5:
            failed.append(job.step)
            raise OSError(28, "No space left on device")
        write_shard(self, job, mine)

    with (
        patch.object(Saver, "_write_shard", failing),
        pytest.raises(CheckpointError, match="3 saves in a row failed"),
    ):
        run_ranks(go, config(tmp_path, "run", save_interval=1), (8,))
    assert failed == [6, 7, 10] and CheckpointReader.open(tmp_path / "run").step == 5


def test_both_directories_go_back_and_a_later_start_takes_nothing_that_was_given_up(tmp_path: Path) -> None:
    """Back from step 9 to 3 without steps 5 to 12: the checkpoint of step 6 has seen some of them and is none of the run."""
    cfg = config(tmp_path, "run", rollback_steps=4, rollback_batches=8, save_copy=str(tmp_path / "copy"))
    expected = run_ranks(go, cfg, (9,))[0]
    roots = [tmp_path / "run/checkpoints", tmp_path / "copy"]
    for root in roots:
        assert [int(folder.name[5:]) for folder in step_folders(root)] == [16, 15, 3]
        assert [record.to for record in read_rollbacks(root)] == [3]
        for step in (15, 16):
            (root / f"step_{step:08d}/metadata.json").unlink()
    started = with_start(tiny_prepared(cfg), {})
    assert started.start_step == 3 and list(started.plan.left_out) == expected["left_out"] == [(32, 96)]
    resumed = run_ranks(resume, cfg)[0]
    for name, tensor in expected["state"].items():
        assert torch.equal(resumed[name], tensor), name


def resume(mesh: Mesh, cfg: Config) -> dict[str, torch.Tensor]:
    run = build_run(with_start(tiny_prepared(cfg), {}), mesh)
    assert train(run)
    return whole_state(run)


@pytest.mark.parametrize("number", range(6))
def test_a_kill_at_any_moment_of_going_back_ends_in_the_same_run(number: int, tmp_path: Path) -> None:
    """Two directories: `latest` goes back and step 6 is deleted in each, then each gets the record. One more start."""
    options = {"rollback_steps": 4, "rollback_batches": 8}
    expected = run_ranks(go, config(tmp_path, "straight", **options), (9,))[0]
    cfg = config(tmp_path, "parts", **options, save_copy=str(tmp_path / "copy"))
    acts = itertools.count()

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(acts) == number:
                raise KeyboardInterrupt
            return act(*args)

        return call

    def write(*args: Any) -> None:
        with (
            patch.object(folders, "_point", dying(folders._point)),
            patch.object(folders, "remove", dying(folders.remove)),
            patch.object(rollback, "write_rollbacks", dying(write_rollbacks)),
        ):
            write_all(*args)

    write_all = rollback._write
    with patch.object(rollback, "_write", write), pytest.raises(KeyboardInterrupt):
        run_ranks(go, cfg, (9,))
    assert next(acts) == number + 1
    resumed = run_ranks(go, cfg, (9,))[0]
    assert resumed["left_out"] == expected["left_out"] == [(32, 96)]
    for name, tensor in expected["state"].items():
        assert torch.equal(resumed["state"][name], tensor), name
    assert rows(cfg) == rows(config(tmp_path, "straight"))
    for root in (tmp_path / "parts/checkpoints", tmp_path / "copy"):
        assert [record.to for record in read_rollbacks(root)] == [3]
        assert [int(folder.name[5:]) for folder in step_folders(root)] == [16, 15, 3]


@pytest.mark.parametrize("dp", [1, 2])
def test_a_gap_that_another_batch_size_cuts_leaves_out_the_same_samples(dp: int, tmp_path: Path) -> None:
    """Samples 48 to 80, then a second stage from 64 on whose batches became 12 samples: that of step 10 begins at 76."""
    stages = [
        {"name": "one", "tokens": 64 * 16, "non_english_share": 0.3},
        {"name": "two", "tokens": 64 * 16, "non_english_share": 0.6},
    ]
    usual = {"lr_decay_style": "constant"}  # the number of steps changes
    changed = {"stages": [stages[0], stages[1] | {"global_batch_size": 12}]} | usual
    with (
        patch("megapoly.train.loop.introduce", side_effect=[None, KeyboardInterrupt]),
        pytest.raises(KeyboardInterrupt),
    ):
        run_ranks(go, config(tmp_path, "parts", stages=stages, **usual), (9,))
    assert CheckpointReader.open(tmp_path / "parts").step == 6
    cfg = config(tmp_path, "parts", **changed)
    results = run_ranks(go, cfg, (), dp=dp)
    assert results[0]["left_out"] == [(48, 80)]
    told = rows(cfg)
    if dp == 1:  # the first steps had one rank
        expected = run_ranks(go, config(tmp_path, "never", **changed), (), ((48, 80),))[0]
        for name, tensor in expected["state"].items():
            assert torch.equal(results[0]["state"][name], tensor), name
        assert told == rows(config(tmp_path, "never", **changed))
    assert [row["step"] for row in told if "left_out" in row] == [7, 8, 9]
    tokens = {row["step"]: sum(row["tokens_by_source"].values()) for row in told if "left_out" not in row}
    assert tokens[6] == 8 * 16 and tokens[10] == 8 * 16 and tokens[11] == 12 * 16
    assert sum(tokens.values()) == (128 - 32) * 16


def stop_in(mesh: Mesh, cfg: Config, spike: int, after: int) -> list[Any]:
    """Asked to stop while that step goes on for the first time: whether it was, and the steps that were trained."""
    run, trained = build_run(tiny_prepared(cfg), mesh), []
    finish = run.buffers.finish

    def stepping(run: Run, step: int) -> Any:
        if step == after and step not in trained:
            run.progress.stop_alone("a test")
        trained.append(step)
        return train_step(run, step)

    run.buffers.finish = lambda: finish().mul_(1000.0 if trained[-1] == spike else 1.0)
    with patch("megapoly.train.loop.train_step", stepping):
        return [not train(run), trained]


@pytest.mark.parametrize(
    ("after", "last", "step"),
    [(9, 9, 6), (11, 11, 11)],  # in the step that spikes; in the first that is trained after those left out
)
def test_a_stop_holds_across_a_rollback(after: int, last: int, step: int, tmp_path: Path) -> None:
    """Without another step before it where the run goes back, though the step it would stop after comes again."""
    cfg = config(tmp_path, "run")
    is_stopped, trained = run_ranks(stop_in, cfg, 9, after)[0]
    assert is_stopped and trained[-1] == last and trained[:9] == list(range(1, 10))
    assert CheckpointReader.open(tmp_path / "run").step == step
    expected = run_ranks(go, config(tmp_path, "straight"), (9,))[0]
    resumed = run_ranks(resume, cfg)[0]
    for name, tensor in expected["state"].items():
        assert torch.equal(resumed[name], tensor), name
    assert rows(cfg) == rows(config(tmp_path, "straight"))


def refused(mesh: Mesh, cfg: Config, spikes: tuple[int, ...]) -> str:
    try:
        go(mesh, cfg, spikes)
    except (TroubleError, Echo) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_rollbacks_have_an_end(tmp_path: Path) -> None:
    """Spikes at steps 9 and 13; where a second rollback is not allowed, the run ends at it in one line."""
    twice = run_ranks(go, config(tmp_path, "twice", rollback_batches=2), (9, 13))[0]
    assert twice["left_out"] == [(56, 72), (88, 104)]
    assert [record.to for record in read_rollbacks(tmp_path / "twice/checkpoints")] == [6, 9 - 3]
    cfg = config(tmp_path, "once", rollback_batches=2, max_rollbacks=1)
    ends = run_ranks(refused, cfg, (9, 13), dp=2)
    assert ends[0].startswith("TroubleError: step 13: the gradient norm is ") and ends[1].startswith("Echo: ")


def test_without_a_checkpoint_before_it_or_a_step_after_it_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    early, last = "no checkpoint before it (--save-interval says how often", "no step after it"
    for name, spike, options, why in (("early", 6, {"save_interval": 0}, early), ("last", STEPS, {}, last)):
        result = run_ranks(go, config(tmp_path, name, **options), (spike,))[0]
        assert result["left_out"] == []
        out = capfd.readouterr().out
        assert f"step {spike}: {why}" in out and (early in out) != (last in out)
        assert not (tmp_path / name / "checkpoints" / NAME).exists()


def test_a_rollback_that_leaves_out_all_the_rest_warns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, batches, count in (("few", 2, 0), ("all", 10**9, 1)):
        run_ranks(go, config(tmp_path, name, rollback_batches=batches), (9,))
        assert capfd.readouterr().out.count(f"rollback_batches ({batches}) spares the last step only") == count


def test_a_run_begun_anew_forgets_rollbacks(tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    (folder / NAME).write_text('[{"step": 9, "why": "", "to": 6, "begin": 48, "end": 80}]')
    assert run_ranks(go, config(tmp_path, "run", exit_interval=2), ())[0]["left_out"] == []
    assert run_ranks(go, config(tmp_path, "run", exit_interval=4), ())[0]["left_out"] == []


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[1]", '[{"step": 9, "why": "", "to": 6, "begin": 48}]',
     '[{"step": 9, "why": "", "to": 6, "begin": 80, "end": 48}]'],
)  # fmt: skip
def test_a_damaged_record_gives_one_clear_line(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CheckpointError, match=NAME) as caught:
        read_rollbacks(tmp_path)
    assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6))
def test_ranges_unite_to_the_same_samples(pairs: list[tuple[int, int]]) -> None:
    ranges = [(begin, begin + length) for begin, length in pairs]
    result = united(ranges)
    assert {n for r in result for n in range(*r)} == {n for r in ranges for n in range(*r)}
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(result))


def test_what_is_left_out_is_part_of_the_plan_from_there_on(tmp_path: Path) -> None:
    plan = tiny_prepared(config(tmp_path, "run")).plan
    gap = dataclasses.replace(plan, left_out=((48, 80),))
    longer = dataclasses.replace(plan, left_out=((48, 81),))
    assert plan.fingerprint(48) == gap.fingerprint(48)
    assert plan.fingerprint(49) != gap.fingerprint(49) and plan.fingerprint() != gap.fingerprint()
    assert gap.fingerprint(80) == longer.fingerprint(80) != longer.fingerprint(81)
    assert [(c.since, str(c)) for c in plan_changes(plan, gap)] == [(48, "samples 48 to 80 are left out")]
    assert [(c.since, str(c)) for c in plan_changes(gap, plan)] == [(48, "samples 48 to 80 were left out and are not")]
    more = dataclasses.replace(plan, left_out=((40, 60), (70, 90)))
    assert [str(c) for c in plan_changes(gap, more)] == [
        "samples 40 to 48 are left out",
        "samples 60 to 70 were left out and are not",
        "samples 80 to 90 are left out",
    ]


def test_a_batch_that_is_left_out_in_part_trains_on_the_rest(tmp_path: Path) -> None:
    run = build_run(tiny_prepared(config(tmp_path, "run")), single_process_mesh())
    whole = run.loader.batch(40, 48)
    plan = dataclasses.replace(run.prepared.plan, left_out=((42, 45), (47, 60)))
    part = run.starting_from(dataclasses.replace(run.prepared, plan=plan)).loader.batch(40, 48)
    kept = sum(int(batch.mask.sum()) for batch in part)
    assert kept == 4 * 16 and sum(int(batch.mask.sum()) for batch in whole) == 8 * 16
    for batch, full in zip(part, whole, strict=True):
        if batch.mask.any():
            assert (batch.tokens == full.tokens).all() and (batch.labels == full.labels).all()


def test_a_stage_whose_first_step_is_left_out_begins_anew_with_the_next(tmp_path: Path) -> None:
    """Its optimizer is reset where the stage is first trained on; without a gap that is its first step."""
    half = STEPS // 2 * 8 * 16
    stages = [
        {"name": "one", "tokens": half, "non_english_share": 0.3},
        {"name": "two", "tokens": half, "non_english_share": 0.6, "reset_optimizer": True},
    ]
    prepared = tiny_prepared(config(tmp_path, "run", stages=stages))
    assert prepared.reset_steps == {9}
    gap = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, left_out=((56, 80), (84, 88))))
    assert [step for step in range(1, STEPS + 1) if gap.leaves_out(step)] == [8, 9, 10]
    assert gap.reset_steps == {11}
