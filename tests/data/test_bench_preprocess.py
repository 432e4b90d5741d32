"""The benchmark of preprocessing runs (tiny) and judges as it says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "preprocess.py"
HAS_MEGATRON = importlib.util.find_spec("megatron") is not None


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_preprocess", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_preprocess"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_smoke(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", str(file), "--only", "tokenizers", "gigatoken"]
    environment = os.environ | {"MEGAPOLY_CORPUS": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == (0 if HAS_MEGATRON else 2), done.stdout + done.stderr
    assert ("needs megatron-core" in done.stdout.splitlines()[-1]) is not HAS_MEGATRON
    document = json.loads(file.read_text())
    assert document["smoke"] is True and document["versions"]["gigatoken"]
    assert [told["library"] for told in document["results"]] == ["tokenizers", "gigatoken"]
    for told in document["results"]:
        assert not told["note"]
        assert told["ratios_seconds"]["bare"] > 0 and told["ratios_core_seconds"]["bare"] > 0
        assert told["mb_per_second"]["megapoly"] == pytest.approx(told["mb"] / told["seconds"]["megapoly"])
        assert 0.01 < told["gb"]["megapoly"] < 4
    assert document["results"][1]["start_seconds"] > 0
    assert isinstance(document["results"][0]["ratio_of_slopes"], float)
    assert "ratio_of_slopes" not in document["results"][1]


def test_the_ratio_of_slopes_counts_no_start(bench: Any) -> None:
    def costs(start: float, slope: float, mb: float) -> list[Any]:
        return [bench.Cost(start + slope * mb, 0.0, 0)] * 3

    whole = {"megapoly": costs(9.0, 0.2, 100), "bare": costs(1.0, 0.1, 100)}
    quarter = {"megapoly": costs(9.0, 0.2, 25), "bare": costs(1.0, 0.1, 25)}
    assert bench.ratio_of_slopes(whole, quarter) == pytest.approx(0.5)


def test_bounds_are_judged_on_the_right_side(bench: Any) -> None:
    told = {"library": "tokenizers", "gb": {"megapoly": 0.9}, "ratios_seconds": {"bare": 0.95}}
    assert bench.judge(told) == {"memory": True, "speed": True}
    told |= {"gb": {"megapoly": 1.2}, "ratios_seconds": {"bare": 0.94}}
    assert bench.judge(told) == {"memory": False, "speed": False}
    fast = {"library": "gigatoken", "gb": {"megapoly": 0.57}, "mb_per_second": {"megapoly": 50.0, "bare": 80.0},
            "start_seconds": 1.9, "tenth_gb": 0.5}  # fmt: skip
    assert set(bench.judge(fast).values()) == {True}
    slow = fast | {"mb_per_second": {"megapoly": 49.9}, "start_seconds": 2.0, "tenth_gb": 0.49}
    assert bench.judge(slow) == {"memory": True, "speed": False, "start": False, "flat": False}


def test_memory_and_cores_are_those_of_all_processes(bench: Any) -> None:
    work = "import time; x = bytearray(60 << 20); x[::4096] = b'x' * len(x[::4096]); time.sleep(0.7)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}]); sum(range(10**7))"
    cost = bench.measure([sys.executable, "-c", code])
    assert cost.peak > 60 << 20 and cost.seconds > 0.7 and cost.core_seconds > 0.05
    with pytest.raises(bench.Failed, match="the reason"):
        bench.measure([sys.executable, "-c", "raise SystemExit('first\\nthe reason')"])
