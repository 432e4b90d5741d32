"""The benchmark of checkpoints runs, on tiny sizes, and takes every figure; what it does where one or a rank is missing."""

import argparse
import json
import multiprocessing
import queue
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.append(str(BENCH))

import checkpoint  # noqa: E402


def test_every_figure_is_taken(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "checkpoint.py"), "--smoke", "--folder", str(tmp_path)]
    found = subprocess.run(
        [*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, timeout=300, check=False,
        cwd=BENCH.parents[1], env={"PYTHONPATH": "kernels:.", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["rank"] for row in results] == [0, 1]
    stalls = {f"stall {name}" for name in ("async", "sync", "torch.save", "dcp.async_save")}
    assert stalls | {"step", "save", "save share", "load", "load share"} <= results[0]["told"].keys()
    assert sum(row["copy"] for row in results) == sum(row["state"] for row in results) < results[0]["written"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]  # its files are gone


def test_a_save_that_ends_before_the_next_step_loses_no_figures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = ["step", "save", "load", "save share", "load share"]
    names += [f"stall {name}" for name in ("async", "sync", "torch.save", "dcp.async_save")]
    told = {name: [1.0] for name in names}
    options = argparse.Namespace(ranks=1, rounds=1, json=tmp_path / "r.json", smoke=True)
    assert checkpoint.report(options, [(0, told, 10, 10, 10)]) == 0
    assert "beside" not in capsys.readouterr().out and options.json.exists()
    checkpoint.report(options, [(0, told | {"beside": [1.5]}, 10, 10, 10)])
    assert "beside a save over alone     1.50" in capsys.readouterr().out


def test_a_rank_that_dies_ends_the_benchmark() -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=sys.exit, args=(status,)) for status in (0, 3)]
    for process in ranks:
        process.start()
    with pytest.raises(SystemExit, match="rank 1 ended with status 3"):
        checkpoint.answers_of(ranks, queue.Queue(), 0.05)
