"""Pipeline schedules as data: each rank's list of actions, a pure function of (rank, stages, micro-batches)."""

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One forward ('F') or backward ('B') pass of a micro-batch."""

    kind: Literal["F", "B"]
    microbatch: int


def one_f_one_b(rank: int, stages: int, microbatches: int) -> list[Action]:
    """1F1B (PipeDream-Flush; Narayanan et al. 2021, arXiv 2104.04473).

    A rank runs ahead by as many forwards as stages follow it, then alternates, so that at most `stages - rank`
    micro-batches are in flight on it.
    """
    ahead = min(stages - 1 - rank, microbatches)
    actions = [Action("F", i) for i in range(ahead)]
    for i in range(ahead, microbatches):
        actions += [Action("F", i), Action("B", i - ahead)]
    return actions + [Action("B", i) for i in range(microbatches - ahead, microbatches)]


def forward_only(microbatches: int) -> list[Action]:
    """Evaluation: forwards in order."""
    return [Action("F", i) for i in range(microbatches)]
