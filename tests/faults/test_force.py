"""A few fault trials of each kind that recovers in seconds (make test-faults: hundreds), and what a trial would notice."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_jobs import Bench, Ending, TrialError
from fault_kinds import Fault
from fault_trials import Outcome, _check, _check_left, run_trial


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


# Seeds whose layout is DP 2, so that one undisturbed run serves all.
@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("kill a rank", 0),
        ("kill the agent", 1),
        ("kill in the rename", 3),
        ("kill in pruning", 4),
        ("flip bits", 8),
        ("truncate files", 9),
        ("fill the disk", 11),
    ],
)
def test_a_run_that_meets_a_fault_ends_as_if_it_had_not(kind: str, seed: int, bench: Bench) -> None:
    outcome = run_trial(bench, seed, kind)
    assert outcome.problem == ""
    assert outcome.layout == "DP 2" and outcome.detected == outcome.damaged


class FakeJob:
    """What is left of a job, without one."""

    def __init__(self, folder: Path, present: set[int], log: str) -> None:
        self.checkpoints, self.log, self.present = folder, folder / "log", present
        self.log.write_text(log)

    def finished(self) -> set[int]:
        return self.present

    def hidden(self) -> list[str]:
        return []


RESUMED = "starting run anew\nresuming run from run/checkpoints/step_00000008 at step 8/24\n"
ENDING = Ending({"shard": "1"}, [{"step": 24}], [])


@pytest.fixture
def fault() -> Iterator[Fault]:
    yield Fault("steps", 10, {4, 8})


def test_a_trial_takes_what_is_as_it_should_be(tmp_path: Path, fault: Fault) -> None:
    outcome = Outcome(0, "", "")
    _check(FakeJob(tmp_path, {8}, RESUMED), fault, outcome, ENDING, ENDING)
    assert (outcome.restarts, outcome.lost) == (1, 2)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("older", "resumed from step 8, the newest that verifies was 12"),
        ("many", "22 steps were lost"),
        ("unseen", r"damaged were \[8\], passed over \[\]"),
        ("invented", r"damaged were \[\], passed over \[12\]"),
        ("bytes", r"other bytes than without the fault: \['shard'\]"),
        ("rows", "another story"),
        ("gone", r"checkpoints of steps \[12\] are not there"),
    ],
)
def test_a_trial_notices_what_is_not(what: str, message: str, tmp_path: Path, fault: Fault) -> None:
    log, ending, undisturbed = RESUMED, ENDING, ENDING
    if what == "older":
        fault.finished.add(12)
    elif what == "many":
        fault.at = 30
    elif what == "unseen":
        fault.damaged.add(8)
    elif what == "invented":
        log += "warning: run/checkpoints/step_00000012 is damaged and was skipped: x\n"
    elif what == "bytes":
        ending = dataclasses.replace(ending, files={"shard": "2"})
    elif what == "rows":
        ending = dataclasses.replace(ending, rows=[])
    elif what == "gone":
        undisturbed = dataclasses.replace(ending, kept=[12])
    with pytest.raises(TrialError, match=message):
        _check(FakeJob(tmp_path, {8}, log), fault, Outcome(0, "", ""), ending, undisturbed)


def test_a_trial_notices_a_finished_checkpoint_that_is_lost_or_damaged(tmp_path: Path, fault: Fault) -> None:
    fault.damaged = {8}
    _check_left(FakeJob(tmp_path, {8}, ""), Fault("", 0, {8}, {8}))  # what the trial itself damaged
    with pytest.raises(TrialError, match="step 4 is lost"):
        _check_left(FakeJob(tmp_path, {8}, ""), fault)
    with pytest.raises(TrialError, match="step 8 is damaged"):
        _check_left(FakeJob(tmp_path, {8}, ""), Fault("", 0, {8}))
