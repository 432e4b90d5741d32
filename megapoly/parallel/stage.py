"""Which layers a pipeline stage holds: consecutive runs of least greatest cost, embedding and head included."""

from collections.abc import Sequence
from dataclasses import dataclass

from megapoly.parallel.mesh import Axis


@dataclass(frozen=True)
class Stage:
    """The part of the model on one pipeline rank: layers first to end - 1, and whether it has embedding and head."""

    first_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.end_layer)


def split_layers(layer_costs: Sequence[float], embedding_cost: float, head_cost: float, stages: int) -> list[int]:
    """Number of layers of each stage so that the most loaded stage carries as little as possible.

    Costs are in any one unit (a layer's forward FLOPs, say). Exact by dynamic programming; among equal splits the
    later stages get the fewer layers. A stage may hold no layer where embedding or head fills it.
    """
    n = len(layer_costs)
    prefix = [0.0]
    for cost in layer_costs:
        prefix.append(prefix[-1] + cost)

    def load(stage: int, begin: int, end: int) -> float:
        extra = (embedding_cost if stage == 0 else 0.0) + (head_cost if stage == stages - 1 else 0.0)
        return prefix[end] - prefix[begin] + extra

    # best[end]: (greatest load, split) for the first stages up to layer `end`.
    best: list[tuple[float, list[int]]] = [(load(0, 0, end), [end]) for end in range(n + 1)]
    for stage in range(1, stages):
        following = []
        for end in range(n + 1):
            options = (
                (max(best[begin][0], load(stage, begin, end)), [*best[begin][1], end - begin])
                for begin in range(end, -1, -1)
            )
            following.append(min(options, key=lambda option: option[0]))
        best = following
    return best[n][1]


def make_stage(split: Sequence[int], pp: Axis) -> Stage:
    """The stage of this pipeline rank under a split."""
    first = sum(split[: pp.rank])
    return Stage(first, first + split[pp.rank], has_embedding=pp.is_first, has_head=pp.is_last)
