"""The data benchmark runs, on tiny sizes, and says what it lacks."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.data.native import NATIVE

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
HAS_MEGATRON = (
    importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None
)


def run(*flags: object, path: str = "kernels:.") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "data.py"), *map(str, flags)]
    root, environment = BENCH.parents[1], {"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, env=environment, check=False)


@pytest.mark.skipif(NATIVE.module is None, reason=NATIVE.reason)
def test_every_figure_of_ours_is_taken(tmp_path: Path) -> None:
    flags = ["--smoke", "--rounds", 2, "--folder", tmp_path, "--json", tmp_path / "r.json"]
    found = run("--only", "opening", "order", "reading", *flags)
    assert found.returncode == 0, found.stdout + found.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["smoke"] and [told["part"] for told in results["results"]] == [
        "opening", "opening", "order", "order", "reading", "reading",
    ]  # fmt: skip
    for told in results["results"]:
        assert told.get("seconds", 1) > 0 and told.get("microseconds", 1) > 0
        assert all(quantity in told for quantity in told.get("most", {}))
        assert told["what"] in found.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]  # its files are gone


@pytest.mark.skipif(NATIVE.module is None or HAS_MEGATRON, reason="about hosts with the extension, without the peer")
def test_without_its_peer_it_says_so_in_a_line() -> None:
    found = run("--smoke")
    assert (found.returncode, found.stderr) == (2, "")
    assert found.stdout.count("\n") == 1 and "needs megatron-core; pip install megatron-core" in found.stdout


@pytest.mark.skipif(NATIVE.module is not None, reason="about hosts without the extension")
def test_without_the_extension_it_says_so_in_a_line() -> None:
    found = run("--smoke")
    assert found.returncode == 2 and found.stdout.count("\n") == 1 and "pip install -e ." in found.stdout
