"""Which layers a global stage holds: consecutive runs of least greatest cost, embedding and head included."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A consecutive part of the model: layers first to end - 1, and whether it has embedding and head.

    `shares_head`: all ranks hold a part of the output matrix; the stage with the head ends in its norm.
    """

    first_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool
    shares_head: bool = False

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.end_layer)


def split_layers(layer_costs: Sequence[float], embedding_cost: float, head_cost: float, stages: int) -> list[int]:
    """Number of layers of each stage: the most loaded stage carries as little as possible, the others are even.

    Costs are in any one unit (a layer's forward FLOPs, say). The first and the last stage may have no layer where
    embedding or head fills them, a stage in between has at least one. Exact, by dynamic programming.
    """
    prefix = [0.0, *itertools.accumulate(layer_costs)]

    def load(stage: int, begin: int, end: int) -> float:
        if begin == end and 0 < stage < stages - 1:
            return math.inf
        extra = (embedding_cost if stage == 0 else 0.0) + (head_cost if stage == stages - 1 else 0.0)
        return prefix[end] - prefix[begin] + extra

    greatest = _best_split(len(layer_costs), stages, load, max)[0] * (1 + 1e-9)
    even = _best_split(
        len(layer_costs),
        stages,
        lambda *part: load(*part) ** 2 if load(*part) <= greatest else math.inf,
        lambda sofar, further: sofar + further,
    )
    return even[1]


def _best_split(
    layers: int,
    stages: int,
    cost: Callable[[int, int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The split of least combined cost(stage, first layer, end layer), with that cost."""
    best: list[tuple[float, list[int]]] = [(cost(0, 0, end), [end]) for end in range(layers + 1)]
    for stage in range(1, stages):
        best = [
            min(
                (combine(best[begin][0], cost(stage, begin, end)), [*best[begin][1], end - begin])
                for begin in range(end + 1)
            )
            for end in range(layers + 1)
        ]
    return best[layers]


def make_stage(split: Sequence[int], number: int, shares_head: bool = False) -> Stage:
    """The global stage of that number under a split."""
    first = sum(split[:number])
    return Stage(first, first + split[number], number == 0, number == len(split) - 1, shares_head)
