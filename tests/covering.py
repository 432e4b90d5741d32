"""Covering arrays: few combinations of options in which all pairs (or triples, ..) of their values meet."""

import itertools
from collections.abc import Callable, Mapping, Sequence

Row = dict[str, str]


def covering(
    options: Mapping[str, Sequence[str]], is_possible: Callable[[Row], bool], strength: int = 2
) -> list[Row]:  # fmt: skip
    """Combinations of one value an option that cover whatever `strength` values any possible combination has together.

    Greedy, and the same each time: the combination that covers most of what is left comes next (ties: the first).
    """
    rows = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    bits: dict[tuple[tuple[str, str], ...], int] = {}
    candidates = []
    for row in filter(is_possible, rows):
        covered = 0
        for values in itertools.combinations(row.items(), min(strength, len(options))):
            covered |= bits.setdefault(values, 1 << len(bits))
        candidates.append((covered, row))
    chosen = []
    left = (1 << len(bits)) - 1
    while left:
        covered, row = max(candidates, key=lambda candidate: (candidate[0] & left).bit_count())
        chosen.append(row)
        left &= ~covered
    return chosen
