"""What a run tells of its progress, and what is done after a step that a signal stops at."""

import os
import signal
from pathlib import Path

import pytest
from tiny_runs import tiny_config, tiny_prepared, tiny_run

from megapoly.checkpoint.load import find_checkpoint
from megapoly.parallel.failure import ending_together
from megapoly.parallel.mesh import single_process_mesh
from megapoly.parallel.progress import Progress
from megapoly.train import loop
from megapoly.train.loop import Due, train
from megapoly.train.setup import Run, build_run
from megapoly.train.step import StepStats, evaluate, train_step


def test_every_batch_of_an_evaluation_is_progress_and_loading_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(single_process_mesh(), tiny_config(tmp_path, "gpt2"))
    beats: list[None] = []
    monkeypatch.setattr(run.progress, "beat", lambda: beats.append(None))
    evaluate(run)
    assert len(beats) == run.valid_loader.num_batches > 0
    assert run.progress.loading == 0
    train_step(run, 1)
    assert run.progress.loading > 0


def test_a_step_that_a_signal_stops_at_saves_and_does_not_evaluate(tmp_path: Path) -> None:
    run = tiny_run(single_process_mesh(), tiny_config(tmp_path, "gpt2", eval_interval=1))
    assert Due.after(run, 1) == Due(compare=False, report=True, evaluate=True, save=False, exit=False)
    assert Due.after(run, 1, True) == Due(compare=False, report=True, evaluate=False, save=True, exit=True)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_phases_of_a_run_and_its_stop(
    sent: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step_with_signal(run: Run, step: int) -> StepStats:
        seen.append((run.progress.phase, run.progress.is_bounded))
        if step == 2:
            os.kill(os.getpid(), sent)
        return train_step(run, step)

    monkeypatch.setattr(loop, "train_step", step_with_signal)
    progress, mesh = Progress(), single_process_mesh()
    seen: list[tuple[str, bool]] = []
    prepared = tiny_prepared(tiny_config(tmp_path, "gpt2"))
    before = signal.getsignal(sent)
    with ending_together(mesh, 10, progress, prepared.cfg.logging.run_dir):
        assert not train(build_run(prepared, mesh, progress))
    assert signal.getsignal(sent) == before
    assert seen == [("train step 1", True), ("train step 2", True)]
    assert (progress.phase, progress.is_bounded) == ("wait for the last save", False)
    assert f"stopped after step 2 ({sent.name}); the same command goes on" in capsys.readouterr().out
    assert find_checkpoint(prepared.cfg.logging.run_dir).name == "step_00000002"


def test_a_signal_before_the_first_step_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress, mesh = Progress(), single_process_mesh()
    prepared = tiny_prepared(tiny_config(tmp_path, "gpt2"))
    with ending_together(mesh, 10, progress, prepared.cfg.logging.run_dir):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not train(build_run(prepared, mesh, progress))
    assert "stopped before any step, nothing to save (SIGUSR1)" in capsys.readouterr().out
    assert not list(Path(prepared.cfg.checkpoint.save or "").glob("step_*"))
