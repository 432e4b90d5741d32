"""Pipeline schedules as data: each rank's list of actions, a pure function of (rank, stages, chunks, micro-batches).

A rank holds `chunks` parts of the model, so the model has stages x chunks parts in a row, its global stages. Kinds of
actions: F forward, B the whole backward, or in its place I, the input's gradient, and later W, that of the weights; H
is a rank's part of the head and its loss, there and back, where all ranks share them and do it together.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

from megapoly.errors import ConfigError

Kind = Literal["F", "H", "B", "I", "W"]
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "1f1b-vocab")


_STEPS = {"F": 1, "B": -1, "I": -1}  # from stage to stage


class ScheduleError(ConfigError, ValueError):
    """A schedule that does not exist for the numbers given; the message names them and the nearest that work."""


class Action(NamedTuple):
    """One pass of a micro-batch through a chunk of a rank: 'F', 'B', or 'I' and 'W' in place of 'B'; or 'H'."""

    kind: Kind
    microbatch: int
    chunk: int = 0


class Message(NamedTuple):
    """Activations (for an 'F') or gradients (for a 'B') on their way to a chunk of a rank; or ranks that meet ('H')."""

    source: int
    target: int
    kind: str
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        what = {"F": "activations", "B": "gradients", "H": "a part of the head"}[self.kind]
        return f"{what} of micro-batch {self.microbatch} from rank {self.source} to chunk {self.chunk} of {self.target}"


class Placement(NamedTuple):
    """Which global stage each chunk of each rank is; `folded` turns round at the last rank and at the first."""

    stages: int
    chunks: int = 1
    folded: bool = False

    @property
    def last(self) -> int:
        """The last global stage; the first is 0."""
        return self.stages * self.chunks - 1

    @property
    def ends_apart(self) -> bool:
        """Whether the first and the last global stage are on different ranks."""
        return self.owner(0)[0] != self.owner(self.last)[0]

    def stage_of(self, rank: int, chunk: int) -> int:
        """The global stage of a chunk."""
        position = self.stages - 1 - rank if self.folded and chunk % 2 else rank
        return chunk * self.stages + position

    def owner(self, stage: int) -> tuple[int, int]:
        """The rank and the chunk that a global stage is."""
        chunk, position = divmod(stage, self.stages)
        return (self.stages - 1 - position if self.folded and chunk % 2 else position), chunk

    def taken(self, rank: int, action: Action) -> Message | None:
        """The message that an action begins with, from another rank or from a chunk of this one; None: none."""
        stage = self.stage_of(rank, action.chunk) - _STEPS.get(action.kind, self.last + 1)
        if not 0 <= stage <= self.last:
            return None
        return Message(self.owner(stage)[0], rank, "F" if action.kind == "F" else "B", action.chunk, action.microbatch)

    def sent(self, rank: int, action: Action) -> Message | None:
        """The message that an action ends in, to another rank or to a chunk of this one; None: none."""
        stage = self.stage_of(rank, action.chunk) + _STEPS.get(action.kind, self.last + 1)
        if not 0 <= stage <= self.last:
            return None
        target, chunk = self.owner(stage)
        return Message(rank, target, "F" if action.kind == "F" else "B", chunk, action.microbatch)


def placement_for(name: str, stages: int, chunks: int = 1) -> Placement:
    """The placement of a schedule: ZB-V folds the model into a V, all others deal its parts out in rounds."""
    return Placement(stages, chunks, folded=name == "zb-v")


def schedule_for(name: str, rank: int, stages: int, chunks: int, microbatches: int) -> list[Action]:
    """The actions of one rank; ScheduleError where the schedule does not exist for these numbers."""
    check_arguments(name, stages, chunks, microbatches)
    if not 0 <= rank < stages:
        raise ScheduleError(f"rank ({rank}) must lie in 0 to {stages - 1}, one for each of {stages} stages")
    if name == "interleaved":
        return interleaved(rank, stages, chunks, microbatches)
    made_by = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h1": zb_h1, "zb-v": zb_v, "1f1b-vocab": one_f_one_b_vocab}
    return made_by[name](rank, stages, microbatches)


def all_lists(name: str, stages: int, chunks: int, microbatches: int) -> list[list[Action]]:
    """The actions of every rank."""
    return [schedule_for(name, rank, stages, chunks, microbatches) for rank in range(stages)]


def forwards_of(lists: list[list[Action]]) -> list[list[Action]]:
    """The forwards of every rank in their order, for evaluation: they wait for nothing but forwards."""
    return [[action for action in actions if action.kind in "FH"] for actions in lists]


def check_arguments(name: str, stages: int, chunks: int, microbatches: int) -> None:
    """Refuse numbers that a schedule does not exist for."""
    if name not in SCHEDULES:
        raise ScheduleError(f"schedule ({name}) must be one of {', '.join(SCHEDULES)}")
    for what, number in (("stages", stages), ("chunks", chunks), ("microbatches", microbatches)):
        if number < 1:
            raise ScheduleError(f"{what} ({number}) must be at least 1")
    if name == "zb-v" and chunks != 2:
        raise ScheduleError(f"chunks ({chunks}) must be 2 for zb-v, which folds the model once")
    if name not in ("interleaved", "zb-v") and chunks != 1:
        raise ScheduleError(f"chunks ({chunks}) must be 1 for {name}; interleaved takes {chunks} chunks")


def gpipe(rank: int, stages: int, microbatches: int) -> list[Action]:
    """GPipe (Huang et al. 2019, arXiv 1811.06965): all forwards, then all backwards, the same on every rank."""
    return [Action(kind, i) for kind in ("F", "B") for i in range(microbatches)]


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


def one_f_one_b_vocab(rank: int, stages: int, microbatches: int) -> list[Action]:
    """1F1B with a head shared by all ranks (the idea of Yeung et al. 2024, arXiv 2411.05288), which meet in each H.

    Between two H a rank has one forward and one backward to do. Neighbours do them in opposite order, so that a forward
    gets through two ranks before the next H, and a backward, which takes longer, through one; then nobody waits for
    another's pass. That takes half as many micro-batches again in flight as 1F1B.
    """
    after = stages - 1 - rank
    actions = []
    for turn in range(-(after // 2), microbatches + after + 1):
        passes = [Action("B", turn - 1 - after), Action("F", turn + after // 2)]
        actions += [Action("H", turn - 1), *(passes[::-1] if after % 2 else passes)]
    return [action for action in actions if 0 <= action.microbatch < microbatches]


def interleaved(rank: int, stages: int, chunks: int, microbatches: int) -> list[Action]:
    """Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473, section 2.2); with one chunk, 1F1B.

    Micro-batches go through the chunks in groups. The paper's groups are as large as there are stages, and refuse other
    numbers of micro-batches; here groups are as even as can be and none is smaller than that, which keeps the paper's
    bubble for every number from `stages` on. A short last group would wait for itself, or for ever.
    """
    if chunks == 1:
        return one_f_one_b(rank, stages, microbatches)
    groups = group_sizes(stages, microbatches)
    ahead = min(2 * (stages - 1 - rank) + (chunks - 1) * groups[0], microbatches * chunks)
    order = [chunk for size in groups for chunk in range(chunks) for _ in range(size)]
    forwards = [("F", chunk) for chunk in order]
    backwards = [("B", chunks - 1 - chunk) for chunk in order]
    steps = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        steps += [forward, backward]
    return _numbered(steps + backwards[len(forwards) - ahead :], microbatches)


def group_sizes(stages: int, microbatches: int) -> list[int]:
    """How many micro-batches pass through a chunk before the next chunk's turn, the largest group first."""
    count = max(microbatches // stages, 1)
    size, larger = divmod(microbatches, count)
    return [size + 1] * larger + [size] * (count - larger)


def zb_h1(rank: int, stages: int, microbatches: int) -> list[Action]:
    """ZB-H1 (Qi et al. 2024, arXiv 2401.10241, section 2.1): 1F1B whose weight gradients wait by `rank` micro-batches.

    So every rank has at most `stages` micro-batches in flight, as many as the first of 1F1B.
    """
    ahead, most = stages - 1 - rank, max(microbatches, stages)
    steps = "F" * ahead + "FI" * rank + "FIW" * (most - stages + 1) + "IW" * ahead + "W" * rank
    return _numbered([(kind, 0) for kind in steps], microbatches)


def zb_v(rank: int, stages: int, microbatches: int) -> list[Action]:
    """ZB-V (Qi et al. 2024, arXiv 2401.10241, section 6; arXiv 2405.15362): two chunks in a V.

    Chunk 0 goes down the ranks and chunk 1 back up, so that the rank that begins a micro-batch ends it too.
    """
    most = max(microbatches, 2 * stages - 1)
    begin = "F0 " * (2 * (stages - rank) - 1) + "F1 F0 " * rank + "F1 I1 W1 " * (stages - rank)
    steady = "F0 I0 W0 F1 I1 W1 " * (most - 2 * stages + 1 + rank) + "I0 W0 F1 I1 W1 " * (stages - rank - 1)
    end = "I0 I1 " * rank + "I0 W0 " * (stages - rank) + "W1 W0 " * rank
    return _numbered([(step[0], int(step[1])) for step in (begin + steady + end).split()], microbatches)


def _numbered(steps: Iterable[tuple[str, int]], microbatches: int) -> list[Action]:
    """The steps with their micro-batches, which come in order in each kind and chunk.

    Steps beyond the last micro-batch fall out: a list that runs for more micro-batches runs for fewer.
    """
    seen: Counter[tuple[str, int]] = Counter()
    actions = []
    for kind, chunk in steps:
        if (number := seen[kind, chunk]) < microbatches:
            actions.append(Action(cast(Kind, kind), number, chunk))
        seen[kind, chunk] += 1
    return actions
