"""The benchmark of deduplication runs (tiny), finds what it wrote in, and says what could not run."""

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "dedup.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("bench_dedup", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_smoke(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", str(file)]
    environment = os.environ | {"MEGAPOLY_CORPUS": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert document["smoke"] is True and document["versions"]["rensa"]
    text, found = document["text"], document["found"]
    assert found["exact"] == text["exact"] > 5 and found["near"] == text["near"] > 5
    results = document["results"]
    assert [told.get("stage", told.get("peer")) for told in results] == [
        "signatures", "buckets", "clusters", "drop", "all",
        "megapoly", "datatrove", "datatrove with str.split", "Python and rensa", "datasketch",
    ]  # fmt: skip
    stages, whole, peers = results[:4], results[4], results[5:]
    assert whole["mb_per_second"] == pytest.approx(1 / sum(1 / told["mb_per_second"] for told in stages))
    assert whole["mb_per_core_second"] == pytest.approx(1 / sum(1 / told["mb_per_core_second"] for told in stages))
    assert whole["gb"] == max(told["gb"] for told in stages) > 0.01 and whole["met"] is False
    for told in peers:
        assert ("not runnable: " in told["note"]) is ("mb_per_core_second" not in told)
    assert not peers[0]["note"] and not peers[2]["note"] and not peers[3]["note"]


def test_copies_are_what_they_are_called(bench: Any) -> None:
    written = list(bench.documents(0.2, True))
    assert {kind for kind, _ in written} == {"new", "exact", "near"}
    for (_, before), (kind, text) in itertools.pairwise(written):
        if kind == "exact":
            assert text == before
        elif kind == "near":
            assert sum(a != b for a, b in zip(text.split(), before.split(), strict=True)) <= 1
    news = [text for kind, text in written if kind == "new"]
    assert len(set(news)) == len(news)


def test_a_varied_text_keeps_its_units(bench: Any) -> None:
    for text, units in (("one two three four five six", str.split), ("北京是中华人民共和国的首都", list)):
        varied = bench.varied(text, random.Random(1), 0.5)
        assert len(units(varied)) == len(units(text)) and set(units(varied)) < set(units(text))


def test_the_bound_is_judged_on_the_median_of_the_whole(bench: Any) -> None:
    def rounds(*seconds: float) -> list[list[Any]]:
        return [[bench.Cost(each / 4, each / 2, 10**9)] * 4 for each in seconds]

    for seconds, met in (((10.0, 12.5, 90.0), True), ((12.0, 12.6, 13.0), False)):
        whole = bench.measured({"mb": 100.0}, rounds(*seconds), 2)[-1]
        assert whole["met"] is met and whole["mb_per_second"] == pytest.approx(100 / sorted(seconds)[1])
        assert ("NOT MET" in bench.row(whole)) is not met
