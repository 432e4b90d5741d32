"""The generator of the parity sweep's combinations."""

import itertools

import pytest
from covering import Row, covering

OPTIONS = {"a": "123", "b": "12345", "c": "12", "d": "1234", "e": "12"}


def is_possible(row: Row) -> bool:
    return not (row["a"] == row["b"] == "3") and (row["c"] == "1" or row["d"] != "4")


def tuples(rows: list[Row], strength: int) -> set[tuple[tuple[str, str], ...]]:
    return {values for row in rows for values in itertools.combinations(row.items(), strength)}


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_whatever_can_meet_meets(strength: int) -> None:
    everything = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    possible = [row for row in everything if is_possible(row)]
    rows = covering(OPTIONS, is_possible, strength)
    assert all(map(is_possible, rows))
    assert tuples(rows, strength) == tuples(possible, strength)
    assert (("a", "3"), ("b", "3")) not in tuples(rows, 2)


def test_few_combinations_are_enough_and_always_the_same() -> None:
    rows = covering(OPTIONS, is_possible)
    assert 20 <= len(rows) <= 26  # 5 x 4 pairs of b and d need 20
    assert rows == covering(OPTIONS, is_possible)


def test_one_impossible_option_leaves_nothing() -> None:
    assert covering(OPTIONS, lambda row: False) == []
