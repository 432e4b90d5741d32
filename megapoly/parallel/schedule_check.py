"""Proof that a schedule runs: every pass once, in order, without deadlock, memory and bubble as published.

Every check raises InvalidSchedule with the first rank and action that break it.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple, NoReturn

from megapoly.parallel.schedule import (
    Action,
    Message,
    Placement,
    all_lists,
    check_arguments,
    group_sizes,
    placement_for,
)
from megapoly.parallel.timeline import (
    Costs,
    Exchanges,
    InvalidSchedule,
    Lists,
    Timeline,
    Transfer,
    name_of,
    planned,
    simulate,
)

# A gap's transfers are one batch. A rank's batches begin one after the other, each when the one before is done (so NCCL
# has them on its stream; gloo begins them all at once, which can only be quicker), and every send is a rendezvous, done
# when its receive has begun. A rank goes on
# "executor": when the batch with what the next action takes is done, and those with all sends but the last 2 x stages
#             (Pipeline.run);
# "blocking": when all so far are done, each transfer being a batch of its own.
Manner = Literal["executor", "blocking"]
MANNERS: tuple[Manner, ...] = ("executor", "blocking")
MOST_HELD = 2
AGAINST = {"F": "F", "H": "H", "B": "BIW", "I": "BI", "W": "BW"}  # what an action must not come after


class Report(NamedTuple):
    """What is known of a schedule that has passed: activations in flight are counted in passes through a chunk."""

    timeline: Timeline
    peaks: list[int]
    bubble_formula: float | None
    formula: str


def check_schedule(name: str, stages: int, chunks: int, microbatches: int, costs: Costs | None = None) -> Report:
    """Prove the lists of a schedule; ScheduleError where it does not exist for these numbers."""
    check_arguments(name, stages, chunks, microbatches)
    costs = costs or Costs()
    lists = all_lists(name, stages, chunks, microbatches)
    timeline = check_lists(lists, placement_for(name, stages, chunks), microbatches, costs)
    for rank, actions in enumerate(lists):
        check_peak(actions, rank, expected_peak(name, rank, stages, chunks, microbatches))
    formula, bubble = expected_bubble(name, stages, chunks, microbatches, costs)
    if bubble is not None and abs(timeline.bubble - bubble) > 1e-9 * timeline.makespan:
        last = max(range(stages), key=lambda rank: timeline.ranks[rank][-1].end)
        problem = f"the bubble is {timeline.bubble:g}, not {formula} = {bubble:g}"
        raise InvalidSchedule(last, len(lists[last]) - 1, name_of(lists[last][-1]), problem)
    return Report(timeline, [peak(actions) for actions in lists], bubble, formula)


def check_lists(lists: Lists, placement: Placement, microbatches: int, costs: Costs | None = None) -> Timeline:
    """Prove any lists: complete, in order, free of deadlock even where all transfers block, few buffers."""
    shares = any(action.kind == "H" for actions in lists for action in actions)
    for rank, actions in enumerate(lists):
        check_complete(actions, rank, placement.chunks, microbatches, shares)
    timeline = simulate(lists, placement, costs)
    exchanges = planned(lists, placement)
    for manner in MANNERS:
        check_exchanges(exchanges, lists, placement, manner)
    for rank, (gaps, actions) in enumerate(zip(exchanges, lists, strict=True)):
        if (buffers := held(gaps, actions)) > MOST_HELD * placement.stages:
            problem = f"{buffers} received messages wait, more than {MOST_HELD} x stages ({placement.stages})"
            raise InvalidSchedule(rank, len(actions), "the list", problem)
    return timeline


def check_complete(actions: Sequence[Action], rank: int, chunks: int, microbatches: int, shares: bool = False) -> None:
    """Each (chunk, micro-batch) has one forward, then either one B or one I and later one W.

    If the ranks share the head, each micro-batch has one H, between its forward and its backward.
    """
    done: set[tuple[str, int, int]] = set()

    def seen(action: Action, kinds: str) -> bool:
        return any((kind, *action[1:]) in done for kind in kinds)

    for position, action in enumerate(actions):
        problem = ""
        if action.kind not in AGAINST:
            problem = f"the kind is none of {', '.join(AGAINST)}"
        elif not (0 <= action.microbatch < microbatches and 0 <= action.chunk < chunks):
            problem = f"there are {microbatches} micro-batches and {chunks} chunks, counted from 0"
        elif seen(action, AGAINST[action.kind]):
            problem = "comes twice"
        elif action.kind in "HBI" and not seen(action, "F"):
            problem = "comes before its forward"
        elif action.kind in "BI" and shares and ("H", action.microbatch, 0) not in done:
            problem = "comes before its H"
        elif action.kind == "W" and not seen(action, "I"):
            problem = "comes before its input gradient (I)"
        if problem:
            raise InvalidSchedule(rank, position, name_of(action), problem)
        done.add(action)
    for action in (Action("F", i, chunk) for i in range(microbatches) for chunk in range(chunks)):
        for kinds in ("F", "BI", "BW", *("H" if shares and action.chunk == 0 else "")):
            if not seen(action, kinds):
                missing = f"{' or '.join(kinds)}{name_of(action)[1:]}"
                raise InvalidSchedule(rank, len(actions), missing, "is missing")


def check_exchanges(exchanges: Exchanges, lists: Lists, placement: Placement, manner: Manner) -> None:
    """Run the exchanges with rendezvous between ranks: no deadlock, and each action takes what has been received.

    Messages from one rank to another are matched in the order begun, without tags.
    """
    begun: Begun = defaultdict(list)
    walks = [
        _Walk(rank, gaps, actions, placement, manner, begun)
        for rank, (gaps, actions) in enumerate(zip(exchanges, lists, strict=True))
    ]
    while any([walk.advance() for walk in walks]):
        pass
    for walk in walks:
        if walk.waits:
            chain = [walk.rank]
            while (peer := walks[chain[-1]].peer()) is not None and chain.count(peer) < 1:
                chain.append(peer)
            transfer = walk.waits[0][0]
            ring = " -> ".join(map(str, chain if peer is None else [*chain, peer]))
            walk.fail(f"deadlock: waits to {'send' if transfer.sends else 'receive'} {transfer.message}; ranks {ring}")


def held(gaps: list[list[Transfer]], actions: Sequence[Action]) -> int:
    """Most messages that a rank has received and not yet used: its buffers."""
    used = {("F" if kind == "F" else "B", chunk, i): at for at, (kind, i, chunk) in enumerate(actions) if kind in "FBI"}
    change = [0] * (len(gaps) + 1)
    for gap, transfers in enumerate(gaps):
        for sends, message in transfers:
            if not sends:
                change[gap] += 1
                change[used[message.kind, message.chunk, message.microbatch] + 1] -= 1
    return max(itertools.accumulate(change))


Begun = defaultdict[tuple[bool, int, int], list[Message]]  # (whether sends, source, target) -> in the order begun


class _Walk:
    """A rank on its way through its list, and its batches on theirs."""

    def __init__(
        self, rank: int, gaps: list[list[Transfer]], actions: Sequence[Action], placement: Placement, manner: Manner,
        begun: Begun,
    ) -> None:  # fmt: skip
        self.rank, self.actions, self.begun = rank, actions, begun
        self.batches: list[list[Transfer]] = []
        self.plan: list[tuple[int, int]] = []  # for each gap: batches posted so far, and those to be done to go on
        self.gap = self.started = 0
        self.waits: list[tuple[Transfer, int]] = []  # of the last batch started, with their numbers in the order begun
        comes: dict[Message, int] = {}
        goes: list[int] = []
        most_open = 2 * placement.stages
        for self.gap, transfers in enumerate(gaps):
            for batch in [[t] for t in transfers] if manner == "blocking" else [transfers] if transfers else []:
                self.batches.append(batch)
                comes |= {message: len(self.batches) for sends, message in batch if not sends}
                goes += [len(self.batches) for sends, _ in batch if sends]
            taken = placement.taken(rank, actions[self.gap]) if self.gap < len(actions) else None
            if self.gap < len(actions) and actions[self.gap].kind == "H":  # every rank meets every other
                others, what = set(range(placement.stages)) - {rank}, ("H", 0, actions[self.gap].microbatch)
                meeting = [Transfer(True, Message(rank, other, *what)) for other in others]
                self.batches.append(meeting + [Transfer(False, Message(other, rank, *what)) for other in others])
            if taken is not None and taken.source != rank and taken not in comes:
                self.fail(f"takes {taken}, which has not been received")
            needed = len(self.batches)
            if manner == "executor" and self.gap < len(actions) and actions[self.gap].kind != "H":
                oldest_sends = goes[-1 - most_open] if len(goes) > most_open else 0
                needed = max(0 if taken is None else comes.get(taken, 0), oldest_sends)
            self.plan.append((len(self.batches), needed))
        self.gap = 0

    def advance(self) -> bool:
        """Go on as far as can be; False: not a step."""
        moved = False
        while True:
            self.waits = [wait for wait in self.waits if not self._met(*wait)]
            posted, needed = self.plan[self.gap]
            if not self.waits and self.started < posted:
                for transfer in self.batches[self.started]:
                    own = self.begun[transfer.sends, transfer.message.source, transfer.message.target]
                    self.waits.append((transfer, len(own)))
                    own.append(transfer.message)
                self.started += 1
            elif self.started - bool(self.waits) >= needed and self.gap < len(self.actions):
                self.gap += 1
            else:
                return moved
            moved = True

    def _met(self, transfer: Transfer, number: int) -> bool:
        sends, message = transfer
        other = self.begun[not sends, message.source, message.target]
        if number >= len(other):
            return False
        if other[number] != message:
            self.fail(f"{'sends' if sends else 'takes'} {message}, but the other end has {other[number]} in that place")
        return True

    def peer(self) -> int | None:
        """The rank that this one waits for."""
        if not self.waits:
            return None
        sends, message = self.waits[0][0]
        return message.target if sends else message.source

    def fail(self, problem: str) -> NoReturn:
        """Refuse the lists where this rank is."""
        is_over = self.gap == len(self.actions)
        what = "after the last" if is_over else f"before {name_of(self.actions[self.gap])}"
        raise InvalidSchedule(self.rank, self.gap, what, problem)


def peak(actions: Sequence[Action]) -> int:
    """Most passes through a chunk in flight: forwards whose B or W is not yet done."""
    counts = itertools.accumulate(1 if a.kind == "F" else -(a.kind in "BW") for a in actions)
    return max(counts, default=0)


def check_peak(actions: Sequence[Action], rank: int, expected: int) -> None:
    """The peak of a rank is the one expected."""
    in_flight = 0
    for position, action in enumerate(actions):
        in_flight += 1 if action.kind == "F" else -(action.kind in "BW")
        if in_flight > expected:
            raise InvalidSchedule(rank, position, name_of(action), f"{in_flight} are in flight, above {expected}")
    if (most := peak(actions)) != expected:
        raise InvalidSchedule(rank, len(actions), "the list", f"at most {most} are in flight, not {expected}")


def expected_peak(name: str, rank: int, stages: int, chunks: int, microbatches: int) -> int:
    """Most passes in flight on a rank, from the papers; for fewer micro-batches than fill the pipeline, by our count.

    ZB-H1: arXiv 2401.10241 section 2.1 (`stages` on every rank); ZB-V: section 6 (`stages` of two chunks each).
    """
    if name == "gpipe":
        return microbatches
    if name == "zb-h1":
        return min(microbatches, stages)
    if name == "zb-v":
        return min(2 * microbatches, microbatches + 1 + rank, 2 * stages)
    if name == "1f1b-vocab":
        after = stages - 1 - rank
        return min(microbatches, (3 * after + 2 + after % 2) // 2)
    if name == "1f1b" or chunks == 1:
        return min(microbatches, stages - rank)
    warm_up = 2 * (stages - 1 - rank) + (chunks - 1) * group_sizes(stages, microbatches)[0]
    return min(microbatches * chunks, warm_up + 1)


def expected_bubble(name: str, stages: int, chunks: int, microbatches: int, costs: Costs) -> tuple[str, float | None]:
    """The published bubble, as a formula and a number, or why there is none (then the simulated one is what is known).

    GPipe, 1F1B, to which sharing the head adds nothing, interleaved: arXiv 2104.04473 section 2.2; ZB-H1, ZB-V: arXiv
    2401.10241 table 2 and section 6.
    """
    forward, input_grad, weight_grad = costs[:3]
    if stages == 1:
        return "0", 0.0
    if costs.latency or costs.shares:
        return "none for uneven stages or with latency", None
    if name == "1f1b-vocab" and forward > input_grad + weight_grad:
        return "none for F > I+W", None
    if name in ("gpipe", "1f1b", "1f1b-vocab") or (chunks == 1 and name == "interleaved"):
        return "(p-1)(F+I+W)", (stages - 1) * costs.whole
    if name != "gpipe" and microbatches < stages:
        return "none for fewer micro-batches than stages", None
    if name == "interleaved":
        return "(p-1)(F+I+W)/v", (stages - 1) * costs.whole / chunks
    if name == "zb-h1":
        if weight_grad > forward:
            return "none for W > F", None
        return "(p-1)(F+I-W)", (stages - 1) * (forward + input_grad - weight_grad)
    if microbatches < 2 * stages - 1 or not forward == input_grad == weight_grad:
        return "none unless F = I = W and m >= 2p-1", None
    return "0", 0.0
