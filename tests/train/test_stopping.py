"""Asked to stop, all ranks end after the same step with a checkpoint; where none makes progress, all stacks are told."""

import fcntl
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megapoly.checkpoint.load import find_checkpoint
from megapoly.data.corpus import prepare_corpus
from megapoly.errors import RESTART_STATUS
from megapoly.parallel.progress import Progress
from megapoly.parallel.stacks import report

HERE = Path(__file__).parent
SMALL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --eval-iters 1 --no-tensorboard "
    "--run-dir run --log-interval 1 --distributed-timeout-minutes 0.3"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare_corpus([str(path) for path in sorted((HERE.parents[1] / "examples/data").glob("*.jsonl"))], str(folder))
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_all_ranks_stop_after_the_same_step_whoever_is_ahead(seed: int) -> None:
    draw = random.Random(seed)
    size, lag = draw.randint(2, 4), draw.randint(0, 3)
    ranks = [Progress() for _ in range(size)]
    done, turn = [0] * size, threading.Condition()

    def main(rank: int) -> None:
        while not ranks[rank].stops_after(done[rank]):
            with turn:  # a step ends once no rank is further behind than a GPU's queue allows
                turn.wait_for(lambda: min(done) >= done[rank] - lag)
                done[rank] += 1
                turn.notify_all()
            time.sleep(draw.random() / 500)

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    time.sleep(draw.random() / 50)
    committed = []
    for rank in draw.sample(range(size), size):
        committed.append(ranks[rank].freeze())
        time.sleep(draw.random() / 100)
    for progress in ranks:
        progress.settle(max(committed), "a test")
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a rank waits for one that has stopped"
    assert done == [max(committed)] * size


def test_a_stop_counts_the_steps_that_were_begun_not_their_numbers() -> None:
    """A run that went back from step 9 to 6: whoever is asked to stop then stops after the step it has begun, 7."""
    progress = Progress()
    assert not any(progress.stops_after(step) for step in (5, 6, 7, 8, 6))
    progress.settle(progress.freeze(), "a test")
    assert progress.stops_after(7)
    behind = Progress()
    assert not any(behind.stops_after(step) for step in (5, 6, 7))
    behind.freeze()
    behind.settle(5, "a test")
    assert [behind.stops_after(step) for step in (8, 6, 7)] == [False, False, True]


def test_standing_still_counts_only_where_a_step_must_end() -> None:
    progress = Progress()
    progress.since -= 100
    assert progress.standstill() == 0
    progress.enter("train step 1")
    progress.since -= 100
    assert progress.standstill() >= 100
    progress.beat()
    assert progress.standstill() < 50
    progress.enter("save", is_bounded=False)
    progress.since -= 100
    assert progress.standstill() == 0


def test_a_report_shares_equal_stacks_and_names_who_is_silent() -> None:
    entries = {rank: {"line": f"at {rank}", "stacks": "A\n" if rank != 3 else "B\n"} for rank in (0, 2, 3)}
    text = report("title", {rank: f"rank {rank}" for rank in range(4)}, entries)
    assert text == (
        "title\n  rank 0: at 0\n  rank 1: gives no sign of life\n  rank 2: at 2\n  rank 3: at 3\n"
        "stacks of ranks 0, 2:\nA\nstacks of rank 3:\nB\n"
    )


def start_ranks(
    size: int, folder: Path, data: Path, how: str, *flags: str, stdout: int | None = None
) -> list[subprocess.Popen[bytes]]:
    """As Slurm's srun does: one process a rank, no launcher above them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        with (folder / "log").open("a") as log:
            command = [sys.executable, str(HERE / "failing.py"), how, "--config", "tiny", "--data-root", str(data)]
            processes.append(subprocess.Popen(
                [*command, *SMALL.split(), *flags], cwd=folder, stdout=log if stdout is None else stdout, stderr=log,
                env=os.environ | {name: str(value) for name, value in where.items()},
            ))  # fmt: skip
    return processes


def ends(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """The exit statuses."""
    try:
        return [process.wait(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("size", "sent"), [(1, "SIGTERM"), (1, "SIGINT"), (2, "SIGUSR1"), (2, "SIGINT")])
def test_a_signal_to_one_rank_saves_and_the_same_command_goes_on(
    size: int, sent: str, data: Path, tmp_path: Path
) -> None:
    layout = ("--pipeline-model-parallel-size", str(size), "--train-iters", "30", "--save-interval", "100")
    assert ends(start_ranks(size, tmp_path, data, sent, *layout)) == [RESTART_STATUS] * size
    log = (tmp_path / "log").read_text()
    stopped = re.findall(rf"^stopped after step (\d+) \({sent}.*\); the same command goes on$", log, re.M)
    assert len(stopped) == 1 and 3 <= int(stopped[0]) < 30, log
    run = tmp_path / "run"
    assert find_checkpoint(str(run)).name == f"step_{int(stopped[0]):08d}"
    assert ends(start_ranks(size, tmp_path, data, "go", *layout)) == [0] * size, (tmp_path / "log").read_text()
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 31))


def test_ranks_with_thousands_of_files_hear_signals(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        monkeypatch.setenv("WIDE", "1100")
        processes = start_ranks(2, tmp_path, data, "SIGUSR1", "--pipeline-model-parallel-size", "2")
        assert ends(processes) == [RESTART_STATUS] * 2, (tmp_path / "log").read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def said(folder: Path, text: str, count: int = 1) -> None:
    """Wait until the ranks have said so."""
    deadline = time.monotonic() + 150
    while (folder / "log").read_text().count(text) < count:
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("size", [1, 2])
def test_a_second_interrupt_ends_all_at_once(size: int, data: Path, tmp_path: Path) -> None:
    processes = start_ranks(size, tmp_path, data, "hang", "--pipeline-model-parallel-size", str(size))
    said(tmp_path, "step   1/")
    for _ in range(2):
        time.sleep(1)
        for process in processes:
            process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert set(ends(processes)) <= {-signal.SIGINT, 128 + signal.SIGINT} and time.monotonic() - begin < 5
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_frozen_rank_that_holds_the_store_ends_the_others_in_time(data: Path, tmp_path: Path) -> None:
    """No operation on its store ends, so that the watch itself stands still."""
    processes = start_ranks(2, tmp_path, data, "hang", "--pipeline-model-parallel-size", "2")
    said(tmp_path, "step   1/")
    processes[0].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    try:
        assert processes[1].wait(timeout=40) == 1 and time.monotonic() - begin < 30
    finally:
        processes[0].send_signal(signal.SIGKILL)
        ends(processes)
    name = rf"rank 0 \(\S+, process {processes[0].pid}\)"
    line = rf"^rank 1 \(.*\): .*: {name}, which holds the store of the job, gives no sign of life, for \d+ s now$"
    assert re.search(line, (tmp_path / "log").read_text(), re.M), (tmp_path / "log").read_text()


def test_ranks_whose_lines_nobody_reads_end_in_silence(data: Path, tmp_path: Path) -> None:
    """As under `| head`; the first rank is the one that prints."""
    reader, writer = os.pipe()
    layout = ("--pipeline-model-parallel-size", "2", "--train-iters", "100")
    processes = start_ranks(2, tmp_path, data, "go", *layout, stdout=writer)
    os.close(writer)
    assert os.read(reader, 10)
    os.close(reader)
    assert ends(processes) == [128 + signal.SIGPIPE, 2]
    assert (tmp_path / "log").read_text() == ""


def test_a_mistake_of_the_rank_that_holds_the_store_ends_all_alike_and_soon(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = start_ranks(2, tmp_path, data, "go", "--pipeline-model-parallel-size", "2")
        said(tmp_path, "error: ")
        begin = time.monotonic()
        assert ends(processes) == [2, 2] and time.monotonic() - begin < 10
    log = (tmp_path / "log").read_text()
    assert log.count("another job is writing to this run") == 1 and "frame #" not in log and "rank 1 (" not in log


@pytest.mark.parametrize(
    ("how", "told"), [("hang", "is in no collective, and others wait for it"), ("stop", "no sign of life")]
)
def test_a_hang_ends_all_with_the_stacks_of_all(how: str, told: str, data: Path, tmp_path: Path) -> None:
    processes = start_ranks(2, tmp_path, data, how, "--pipeline-model-parallel-size", "2", "--train-iters", "30")
    assert processes[0].wait(timeout=150) == 1
    if how == "stop":
        processes[1].send_signal(signal.SIGKILL)
    ends(processes)
    (path,) = (tmp_path / "run").glob("hang-*.txt")
    text, log = path.read_text(), (tmp_path / "log").read_text()
    first, *lines = text.splitlines()
    assert re.match(rf"hang: rank 1 \(\S+, process {processes[1].pid}\) .*{told}", first), text
    assert re.match(r"  rank 0 \(.*\): train step 3 for \d+ s: train step 3, .* over pp \(", lines[0]), text
    if how == "hang":
        assert re.match(r"  rank 1 \(.*\): train step 3 for \d+ s: ", lines[1]) and "time.sleep(3600)" in text
    else:
        assert lines[1].endswith(": gives no sign of life")
    assert "in train_step" in text and text in log and f"{path.relative_to(tmp_path)}" in log


def test_the_launcher_passes_its_end_on_and_starts_again_what_was_saved(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1", str(HERE / "failing.py"), "SIGUSR1", "--config", "tiny", "--data-root", str(data),
               *SMALL.split(), "--pipeline-model-parallel-size", "2"]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 200
        while not re.search(r"^resuming .*\n(.*\n)*step", (tmp_path / "log").read_text(), re.M):
            assert time.monotonic() < deadline and launcher.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=60)
    finally:
        launcher.kill()
        launcher.wait()
    log_text = (tmp_path / "log").read_text()
    stopped = re.findall(r"^stopped after step (\d+) \((SIG\w+) to rank", log_text, re.M)
    assert [name for _, name in stopped] == ["SIGUSR1", "SIGTERM"], log_text
    assert find_checkpoint(str(tmp_path / "run")).name == f"step_{int(stopped[1][0]):08d}"
