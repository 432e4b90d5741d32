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
    bits: dict[tuple[tuple[str, str], ...], int] = {}
    candidates = []
    for values in itertools.product(*options.values()):
        if is_possible(dict(zip(options, values, strict=True))):
            met = itertools.combinations(zip(options, values, strict=True), min(strength, len(options)))
            covered = sum(bits.setdefault(together, 1 << len(bits)) for together in met)
            candidates.append((covered, values))
    chosen = []
    left = (1 << len(bits)) - 1
    while left:
        covered, values = max(candidates, key=lambda candidate: (candidate[0] & left).bit_count())
        chosen.append(dict(zip(options, values, strict=True)))
        left &= ~covered
    return chosen
