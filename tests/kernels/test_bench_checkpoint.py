"""The benchmark of checkpoints runs, on tiny sizes, and takes every figure."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


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
