"""When the actions of a schedule happen, by simulation, and what ranks exchange between them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megapoly.parallel.schedule import Action, Message, Placement

Lists = Sequence[Sequence[Action]]  # the actions of each rank


class InvalidSchedule(ValueError):
    """Lists of actions that cannot run; the message names the first offending rank and action."""

    def __init__(self, rank: int, position: int, what: str, problem: str) -> None:
        super().__init__(f"rank {rank}, action {position} ({what}): {problem}")
        self.rank, self.position = rank, position


class Costs(NamedTuple):
    """Time of a rank's forward, input gradient and weight gradient of one micro-batch, all its chunks together.

    `shares` are the parts of it that each global stage takes, where they are not even (1 / chunks each).
    `latency` passes between the end of an action and the arrival of what it made on another rank. `head` is the time of
    a rank's part of a shared head.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    latency: float = 0.0
    shares: tuple[float, ...] = ()
    head: float = 1.0

    @property
    def whole(self) -> float:
        """Time of one micro-batch on a rank."""
        return self.forward + self.input_grad + self.weight_grad

    def of(self, action: Action, stage: int, chunks: int) -> float:
        """Time of an action on a global stage."""
        if action.kind == "H":
            return self.head
        backward = self.input_grad + self.weight_grad
        cost = {"F": self.forward, "B": backward, "I": self.input_grad, "W": self.weight_grad}[action.kind]
        return cost * self.shares[stage] if self.shares else cost / chunks


class Event(NamedTuple):
    """An action with its time."""

    action: Action
    start: float
    end: float


class Timeline(NamedTuple):
    """The events of each rank."""

    ranks: list[list[Event]]

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return max(events[-1].end for events in self.ranks)

    @property
    def busy(self) -> list[float]:
        """Time that each rank computes."""
        return [sum(end - start for _, start, end in events) for events in self.ranks]

    @property
    def bubble(self) -> float:
        """Longest time from a rank's first start to its last end, less the most work (Qi et al. 2024, section 5.3)."""
        return max(events[-1].end - events[0].start for events in self.ranks) - max(self.busy)

    @property
    def idle_share(self) -> float:
        """Part of ranks x makespan in which nothing is computed."""
        return 1 - sum(self.busy) / (len(self.ranks) * self.makespan)


class Transfer(NamedTuple):
    """One end of a message: the source's (`sends`) or the target's."""

    sends: bool
    message: Message


# What each rank sends and receives before each of its actions and after the last.
Exchanges = list[list[list[Transfer]]]


def simulate(lists: Lists, placement: Placement, costs: Costs | None = None) -> Timeline:
    """Run all ranks side by side, each action as soon as its rank is free and what it takes has come.

    InvalidSchedule where ranks wait for ever.
    """
    costs = costs or Costs()

    def cost(rank: int, action: Action) -> float:
        return costs.of(action, placement.stage_of(rank, action.chunk), placement.chunks)

    return _simulate(lists, placement, cost, costs.latency)


def _simulate(
    lists: Lists, placement: Placement, cost: Callable[[int, Action], float], latency: float = 0.0
) -> Timeline:
    made: dict[Message, float] = {}
    met: dict[int, dict[int, float]] = defaultdict(dict)  # micro-batch -> since when each rank has been ready for its H
    events: list[list[Event]] = [[] for _ in lists]
    clocks = [0.0] * len(lists)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while len(events[rank]) < len(actions):
                action, start = actions[len(events[rank])], clocks[rank]
                if (taken := placement.taken(rank, action)) is not None:
                    if taken not in made:
                        break
                    start = max(start, made[taken] + (latency if taken.source != rank else 0.0))
                if action.kind == "H":
                    ready = met[action.microbatch]
                    ready[rank] = start
                    if len(ready) < len(lists):
                        break
                    start = max(ready.values()) + (latency if len(lists) > 1 else 0.0)
                clocks[rank] = start + cost(rank, action)
                events[rank].append(Event(action, start, clocks[rank]))
                if (sent := placement.sent(rank, action)) is not None:
                    made[sent] = clocks[rank]
                moved = True
    for rank, actions in enumerate(lists):
        if (position := len(events[rank])) < len(actions):
            taken = placement.taken(rank, actions[position])
            problem = f"waits for ever for {taken or 'what all ranks do together'}"
            raise InvalidSchedule(rank, position, name_of(actions[position]), problem)
    return Timeline(events)


def planned(lists: Lists, placement: Placement) -> Exchanges:
    """Exchanges that cannot deadlock even if every send and receive blocks until its other end is there.

    Give every action one slot of time, and a rank's first one to follow: at the instant at which a message is made its
    target, too, stands between two actions, and receives it there. Ordered by instant and source, the messages are in
    one order on all ranks, so that the first unfinished one always has both ends ready; messages of a pair of ranks
    are received in the order of their sends, as NCCL, which knows no tags, needs it.
    """
    slots = _simulate(lists, placement, lambda rank, action: 1)
    messages = []
    for rank, events in enumerate(slots.ranks):
        for position, (action, _, end) in enumerate(events):
            if (message := placement.sent(rank, action)) is not None and message.target != rank:
                messages.append((end, rank, position + 1, message))
    exchanges: Exchanges = [[[] for _ in range(len(actions) + 1)] for actions in lists]
    gaps = [0] * len(lists)
    for end, rank, gap, message in sorted(messages):
        exchanges[rank][gap].append(Transfer(True, message))
        target, events = message.target, slots.ranks[message.target]
        while gaps[target] < len(events) and events[gaps[target]].start < end:
            gaps[target] += 1
        exchanges[target][gaps[target]].append(Transfer(False, message))
    return exchanges


def name_of(action: Action) -> str:
    """An action in words."""
    return f"{action.kind} of micro-batch {action.microbatch}, chunk {action.chunk}"
