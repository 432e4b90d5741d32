"""The Slurm script with stand-ins for srun and scontrol: who is signalled, and what goes back into the queue."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/slurm/pretrain.sbatch"
SRUN = """#!/usr/bin/env bash
trap 'exit 75' USR1
echo "$MASTER_ADDR" > master
SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_NTASKS_PER_NODE=2 PATH="$PWD:$PATH" "${@:2}" || exit "$?"
[ -e waits ] || exit 0
touch ready
for _ in $(seq 600); do sleep 0.1; done
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $*" > rank
exit "$(cat status)"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else echo "$*" >> queue; fi
"""


def start(folder: Path, status: int) -> subprocess.Popen[str]:
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL), ("status", f"{status}\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]",
                   "SLURM_RESTART_COUNT": "99"}  # fmt: skip
    command = ["bash", str(SCRIPT), "examples/pretrain_polylm.sh", "--config", "a b.yaml"]
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("status", "failures", "queued", "left"),
    [(75, 20, True, None), (1, None, True, 1), (137, 19, True, 20), (1, 20, False, 21), (2, 3, False, 3),
     (0, 3, False, None)],
)  # fmt: skip
def test_what_may_go_on_is_queued_again(
    status: int, failures: int | None, queued: bool, left: int | None, tmp_path: Path
) -> None:
    """Failures are counted until the next stop that was asked for; Slurm's own count grows with every requeue."""
    count = tmp_path / "slurm-77.failures"
    if failures is not None:
        count.write_text(f"{failures}\n")
    script = start(tmp_path, status)
    assert script.wait(timeout=60) == status
    assert (int(count.read_text()) if count.exists() else None) == left
    assert (tmp_path / "queue").is_file() == queued
    assert (tmp_path / "rank").read_text() == "3 4 1 2 examples/pretrain_polylm.sh --config a b.yaml\n"
    assert (tmp_path / "master").read_text() == "first\n"


def test_the_signal_of_slurm_reaches_the_ranks_and_the_saved_run_is_queued(tmp_path: Path) -> None:
    (tmp_path / "waits").touch()
    script = start(tmp_path, 0)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(timeout=60) == 75
    finally:
        script.kill()
    assert (tmp_path / "queue").read_text() == "requeue 77\n"
