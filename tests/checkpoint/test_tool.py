"""tools/checkpoint.py says what checkpoints hold, whether they are whole, and in what they differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import run_to_end, tiny_config

from megapoly.parallel.mesh import single_process_mesh

TOOL = Path(__file__).parents[2] / "tools/checkpoint.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_to_end(single_process_mesh(), tiny_config(folder, "gpt2", 4, save_interval=1, most_recent_k=3))
    content = bytearray((folder / "run/checkpoints/step_00000002/shard_00000.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "run/checkpoints/step_00000002/shard_00000.safetensors").write_bytes(content)
    return folder / "run"


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, words)], capture_output=True, text=True, timeout=100, check=False
    )


def test_list(root: Path) -> None:
    found = tool("list", root)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert ["step_00000004" in lines[0], lines[0][0], lines[1][0], len(lines)] == [True, "*", " ", 3]
    assert "step 4  32 samples  0.006 GB  TP 1 x CP 1 x PP 1 x DP 1" in lines[0]
    entries = [json.loads(line) for line in tool("list", root / "checkpoints", "--json").stdout.splitlines()]
    assert [(entry["step"], entry["samples"], entry["is_latest"]) for entry in entries] == [
        (4, 32, True), (3, 24, False), (2, 16, False),
    ]  # fmt: skip


def test_verify(root: Path) -> None:
    newest, all_of_them = tool("verify", root), tool("verify", root, "--all", "--json")
    assert (newest.returncode, newest.stdout) == (0, f"{root / 'checkpoints/step_00000004'}: whole\n")
    assert all_of_them.returncode == 2
    problems = {Path(e["folder"]).name: e["problems"] for e in map(json.loads, all_of_them.stdout.splitlines())}
    assert problems.keys() == {"step_00000002", "step_00000003", "step_00000004"}
    assert [len(p) for p in problems.values()] == [0, 0, 1] and "does not fit" in problems["step_00000002"][0]
    damaged = tool("verify", root / "checkpoints/step_00000002")
    assert damaged.returncode == 2 and damaged.stdout.count("\n") == 1 and "DAMAGED" in damaged.stdout


def test_show(root: Path) -> None:
    found = tool("show", root)
    assert found.returncode == 0 and "\n  samples 32\n" in found.stdout
    assert "  model.embedding.word.weight  (1003, 144) float32, 1 chunks" in found.stdout
    tree = json.loads(tool("show", root, "--json").stdout)
    assert tree["state"]["config"]["model"]["hidden_size"] == 144
    assert tree["tensors"]["exp_avg.final_norm.weight"] == {"shape": [144], "dtype": "float32", "chunks": 1}


def test_diff(root: Path) -> None:
    same = tool("diff", root, root / "checkpoints/step_00000004")
    assert (same.returncode, same.stdout) == (0, "no difference\n")
    found = tool("diff", root, root / "checkpoints/step_00000003")
    assert found.returncode == 1
    assert "samples: 32 in the first, 24 in the second\n" in found.stdout
    assert "model.final_norm.weight: 144 of 144 entries, by " in found.stdout


def test_differences_within_entries_are_named(root: Path) -> None:
    lines = tool("diff", root, root / "checkpoints/step_00000003").stdout.splitlines()
    assert (
        [line for line in lines if line.startswith("watch.")]
        == [
            line
            for line in lines
            if line.startswith(("watch.losses[3]: ", "watch.norms[3]: ")) and "nothing in the second" in line
        ]
        != []
    )


def test_a_reader_that_goes_away_ends_a_tool_in_silence(root: Path) -> None:
    words = f"'{sys.executable}' '{TOOL}' show '{root}' --json"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | true"], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.mark.parametrize("words", [["list"], ["verify", "NOWHERE"], ["show", "NOWHERE"], ["guess", "NOWHERE"]])
def test_bad_input_gives_one_line(words: list[str], tmp_path: Path) -> None:
    found = tool(*(str(tmp_path) if word == "NOWHERE" else word for word in words))
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
