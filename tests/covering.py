"""Covering arrays: few rows in which every combination of so many factors' values occurs (Cohen et al. 1997, AETG)."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, int]  # of each factor, the number of its value
Part = tuple[tuple[str, int], ...]


def parts_of(row: Row, strength: int) -> Iterator[Part]:
    """The combinations of values of `strength` factors that a row has."""
    return itertools.combinations(sorted(row.items()), strength)


def covering(
    factors: Mapping[str, Sequence[Any]], is_possible: Callable[[Row], bool], strength: int = 2, seed: int = 0
) -> list[Row]:
    """Rows that together have every combination of `strength` factors' values which some possible row has.

    Deterministic. A combination for which no possible row is found in 200 draws counts as impossible.
    """
    draw = random.Random(seed)

    def drawn(part: Part = ()) -> Row | None:
        for _ in range(200):
            row = {name: draw.randrange(len(values)) for name, values in factors.items()} | dict(part)
            if is_possible(row):
                return row
        return None

    missing = {
        tuple(zip(names, numbers, strict=True))
        for names in itertools.combinations(sorted(factors), strength)
        for numbers in itertools.product(*(range(len(factors[name])) for name in names))
    }

    def gain(row: Row) -> int:
        return sum(part in missing for part in parts_of(row, strength))

    def climbed(row: Row) -> Row:
        """The row with its values changed one by one as long as that adds to what it has of the missing."""
        for name, number in itertools.product(factors, range(max(map(len, factors.values())))):
            other = row | {name: number}
            if number < len(factors[name]) and gain(other) > gain(row) and is_possible(other):
                row = other
        return row

    rows: list[Row] = []
    while missing:
        hardest = min(missing)
        candidates = [climbed(row) for row in (drawn(hardest) for _ in range(8)) if row is not None]
        if not candidates:
            missing.discard(hardest)
            continue
        rows.append(max(candidates, key=gain))
        missing.difference_update(parts_of(rows[-1], strength))
    return rows
