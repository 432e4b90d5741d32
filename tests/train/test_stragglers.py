"""A rank that is slow by itself is named, with its host and in what; one that is slow for a moment is not."""

import socket

import pytest
from ranks import run_ranks

from megapoly.parallel.mesh import Mesh
from megapoly.train.stragglers import REPORTS, Judge, Stragglers


def test_a_rank_is_named_once_after_so_many_reports_in_a_row_and_again_after_a_recovery() -> None:
    judge = Judge("computing", ["a", "b", "c"], factor=1.5)
    slow, well = [1.0, 1.8, 1.1], [1.0, 1.4, 1.1]
    said = [judge.add(seconds) for seconds in [*[slow] * (REPORTS - 1), well, *[slow] * (REPORTS + 3), well]]
    (number,) = [number for number, lines in enumerate(said) if lines]
    assert number == 2 * REPORTS - 1 and len(said[number]) == 1
    assert said[number][0].startswith("rank 1 (b) is slow in computing: 1.8e+03 ms where the median is 1.1e+03 ms")
    assert sum(bool(judge.add(slow)) for _ in range(REPORTS)) == 1


def test_one_of_two_is_named_and_a_difference_of_no_account_is_not() -> None:
    judge = Judge("loading batches", ["a", "b"], factor=1.5, least=0.01)
    assert not any(judge.add([0.001, 0.009]) for _ in range(2 * REPORTS))
    assert sum(len(judge.add([0.05, 0.001])) for _ in range(2 * REPORTS)) == 1


def compared(mesh: Mesh) -> tuple[dict[str, float], list[str], bool]:
    stragglers = Stragglers(mesh)
    measures = stragglers.probe() > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stragglers, "probe", lambda: 1.0 + mesh.world.rank)
        lines = [line for _ in range(REPORTS) for line in stragglers.compare(0.5 - 0.1 * mesh.world.rank)[1]]
        return stragglers.compare(0.5 - 0.1 * mesh.world.rank)[0], lines, measures


def test_all_ranks_compare_the_same_numbers() -> None:
    first, second = run_ranks(compared, dp=2)
    assert first == second and first[2]
    assert first[0] == {
        "probe_seconds_median": 1.0, "probe_seconds_max": 2.0, "probe_slowest_rank": 1,
        "loading_seconds_median": 0.4, "loading_seconds_max": 0.5, "loading_slowest_rank": 0,
    }  # fmt: skip
    assert len(first[1]) == 1 and first[1][0].startswith(f"rank 1 ({socket.gethostname()}) is slow in computing")
