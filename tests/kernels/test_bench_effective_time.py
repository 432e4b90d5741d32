"""The estimate of effective training time: its formula by hand and by simulation, and that a real restart is measured."""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.append(str(BENCH))

import effective_time  # noqa: E402
import restart  # noqa: E402
from effective_time import Costs, estimate  # noqa: E402


@pytest.mark.parametrize(
    ("nodes", "hours", "slow", "fast"),
    [(16, 231, (136, 98.9), (30, 99.7)), (64, 58, (68, 97.6), (15, 99.4)), (128, 29, (48, 96.4), (11, 99.1))],
)
def test_the_model_by_hand(nodes: int, hours: int, slow: tuple[int, float], fast: tuple[int, float]) -> None:
    """Saves that cost 40 s and restarts of 15 minutes; then 2 s and 5 minutes."""
    for costs, (minutes, share) in ((Costs(40, 0, 900), slow), (Costs(2, 0, 300), fast)):
        found = estimate(costs, nodes, 6.5)
        assert round(found.between_failures / 3600) == hours
        assert round(found.interval / 60) == minutes
        assert round(100 * found.effective, 1) == share


def test_the_model_tells_what_a_simulation_does() -> None:
    """Failures at random moments, saves in between: the share of the time that was not lost."""
    costs, nodes, chance = Costs(stall=20.0, writing=60.0, restart=600.0), 128, random.Random(0)
    model = estimate(costs, nodes, 6.5)
    passed = trained = 0.0
    for _ in range(4000):
        up = chance.expovariate(1 / model.between_failures)
        saves = max(0.0, up - costs.writing) // (model.interval + costs.stall)
        passed += up + costs.restart
        trained += saves * model.interval
    assert trained / passed == pytest.approx(model.effective, abs=0.004)


def test_other_intervals_lose_more() -> None:
    costs, nodes = Costs(5.0, 10.0, 300.0), 64
    best = estimate(costs, nodes, 6.5)

    def lost(interval: float) -> float:
        return costs.stall / interval + (interval / 2 + costs.writing + costs.restart) / best.between_failures

    assert lost(best.interval) == pytest.approx(1 - best.effective)
    assert min(lost(0.8 * best.interval), lost(1.25 * best.interval)) > 1 - best.effective


def test_costs_of_saves_are_those_of_the_slowest_rank_with_what_steps_lose_beside_them() -> None:
    told = {"stall async": [0.1, 0.3, 0.2], "stall sync": [2.0, 2.0, 8.0], "beside": [1.25, 1.25, 9.0]}
    rows = [{"told": told}, {"told": {"stall async": [0.1], "stall sync": [1.0]}}]
    stall, writing = effective_time.costs_of_saves({"results": rows})
    assert writing == 2.0
    assert stall == pytest.approx(0.2 + 2.0 * (1 - 1 / 1.25))


def test_assumed_rows_take_another_load_and_stall() -> None:
    options = argparse.Namespace(gigabytes=156.0, read_rate=2.0, start_seconds=180.0, assumed_stall=2.0)
    found = effective_time.cost_sets(Costs(0.1, 1.0, 9.0), 4.0, options)
    assert list(found.values()) == [Costs(0.1, 1.0, 9.0), Costs(2.0, 78.0, 263.0), Costs(2.0, 78.0, 713.0)]
    assert [name.startswith("assumed: ") for name in found] == [False, True, True]


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "effective_time.py"), *map(str, flags)]
    environment = {"PYTHONPATH": "kernels:.", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, cwd=BENCH.parents[1], env=environment, check=False
    )


def test_a_real_restart_is_measured_by_parts(tmp_path: Path) -> None:
    found = run("--smoke", "--stall", 0.1, "--writing", 2, "--json", tmp_path / "r.json")
    assert found.returncode == 0, found.stdout + found.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    told = results["restart"]
    assert list(told["parts"]) == restart.PARTS and min(told["parts"].values()) >= 0
    assert told["seconds"] == pytest.approx(sum(told["parts"].values())) and told["parts"]["imports"] > 0.1
    assert told["loaded"] > 10**6
    assert [row["nodes"] for row in results["estimates"]["measured on this host"]] == [16, 64, 128]
    assert found.stdout.count("effective") == 3 and found.stdout.count("assumed: ") == 2


def test_a_given_stall_comes_with_the_time_of_writing() -> None:
    for flags in (
        ("--stall", 0.1),
        ("--writing", 2),
        ("--stall", 0, "--writing", 2),
        ("--stall", 0.1, "--writing", -1),
    ):
        found = run(*flags, "--restart", 9)
        assert (found.returncode, "--writing" in found.stderr.splitlines()[-1], found.stdout) == (2, True, "")
    assert "stall 0.10 s, written in 2.0 s" in run("--stall", 0.1, "--writing", 2, "--restart", 9).stdout


@pytest.mark.parametrize("flags", [(), ("--checkpoint", "nowhere.json"), ("--checkpoint", "LICENSE")])
def test_without_the_cost_of_a_save_it_says_what_to_give(flags: tuple[str, ...]) -> None:
    found = run(*flags)
    assert (found.returncode, found.stderr, found.stdout.count("\n")) == (2, "", 1)
    assert "make bench-checkpoint" in found.stdout
