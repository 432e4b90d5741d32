"""A rank that is killed, fails or stands still ends the job: the others say who it was and where they waited."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megapoly.data.corpus import prepare_corpus

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
LAYOUT = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
SMALL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --train-iters 6 --eval-iters 1 --no-tensorboard"
LINE = re.compile(r"^rank (\d) \(\S+, process (\d+)\): train step 3, (.+?) \(.+?, \w+\.py:\d+\): rank 2 (.+)$", re.M)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare_corpus([str(path) for path in sorted((HERE.parents[1] / "examples/data").glob("*.jsonl"))], str(folder))
    return folder


def start(how: str, data: Path, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [*TORCHRUN, str(HERE / "failing.py"), how, "--data-root", str(data), *LAYOUT, *SMALL.split(), *flags],
            cwd=folder, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("how", "minutes", "reason"),
    [
        ("kill", "5", "is gone"),
        ("raise", "5", "ended with ArithmeticError: the sum does not add up"),
        ("stop", "0.2", "gives no sign of life"),
    ],
)
def test_the_others_end_in_time_and_name_the_rank_and_the_collective(
    how: str, minutes: str, reason: str, data: Path, tmp_path: Path
) -> None:
    launcher = start(how, data, tmp_path, "--distributed-timeout-minutes", minutes)
    try:
        deadline = time.monotonic() + 100
        lines: list[tuple[str, ...]] = []
        while len(lines) < 3:
            lines = LINE.findall((tmp_path / "log").read_text())
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert sorted(rank for rank, *_ in lines) == ["0", "1", "3"]
        for rank, _, where, why in lines:
            assert reason in why, (rank, why)
            # Rank 3 shares matrices with rank 2; of ranks 0 and 1 one waits for the next stage, or both do.
            assert ("over tp" if rank == "3" else " over ") in where, (rank, where)
        assert any("over pp" in where for rank, _, where, _ in lines if rank != "3"), lines
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{process}").exists() for _, process, *_ in lines):
            assert time.monotonic() < deadline, "a rank has spoken and not ended"
            time.sleep(0.1)
        if how != "stop":  # there torchrun waits half a minute for the stopped one
            assert launcher.wait(timeout=30) == 1
    finally:
        launcher.kill()
        launcher.wait()


def test_what_one_rank_refuses_it_says_alone(data: Path, tmp_path: Path) -> None:
    launcher = start("refuse", data, tmp_path)
    assert launcher.wait(timeout=100) == 1
    log = (tmp_path / "log").read_text()
    assert log.count("error: a file of rank 2 is damaged") == 1 and "exitcode  : 2" in log
    assert not re.findall(r"^rank \d \(", log, re.M), "the others have nothing to say"
    assert "Traceback" not in log.partition("error: ")[0]


def test_a_disk_that_does_not_answer_ends_the_job_for_a_restart(data: Path, tmp_path: Path) -> None:
    flags = "--save-interval 2 --max-save-minutes 0.05 --run-dir run".split()
    launcher = start("stuck", data, tmp_path, *flags)
    assert launcher.wait(timeout=100) == 1
    log = (tmp_path / "log").read_text()
    folder = r"run/checkpoints/\.step_00000002\.\w+\.tmp"
    lines = re.findall(rf"^error: rank 2: {folder} is being written for \d+ s now and does not end .*$", log, re.M)
    assert len(lines) == log.count("error: rank") == 1, log
    assert "exitcode  : 1" in log and "exitcode  : 2" not in log
    assert not re.findall(r"^rank \d \(", log, re.M) and "Traceback" not in log.partition("error: ")[0]
