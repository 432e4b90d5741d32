"""The validator: every schedule passes in a broad sweep, and whatever is broken does not."""

import itertools

import pytest

from megapoly.parallel import schedule_check
from megapoly.parallel.schedule import (
    SCHEDULES,
    Action,
    Placement,
    forwards_of,
    one_f_one_b,
    placement_for,
    schedule_for,
)
from megapoly.parallel.schedule_check import (
    MANNERS,
    check_complete,
    check_exchanges,
    check_lists,
    check_peak,
    check_schedule,
    expected_peak,
    held,
    peak,
)
from megapoly.parallel.stage import split_layers
from megapoly.parallel.timeline import Costs, Exchanges, InvalidSchedule, Transfer, planned, simulate

EVEN = Costs(12, 12, 12)  # a twelfth, so that a chunk's time is exact
UNEVEN = Costs(24, 36, 12)
CHUNKS = {"interleaved": (1, 2, 3, 4), "zb-v": (2,)}
Lists = list[list[Action]]


def just_in_time(lists: Lists, placement: Placement) -> Exchanges:
    """The simplest exchanges: send what was just made, receive what comes next."""
    exchanges: Exchanges = [[[] for _ in range(len(actions) + 1)] for actions in lists]
    for rank, actions in enumerate(lists):
        for position, action in enumerate(actions):
            sent, taken = placement.sent(rank, action), placement.taken(rank, action)
            if sent is not None and sent.target != rank:
                exchanges[rank][position + 1].append(Transfer(True, sent))
            if taken is not None and taken.source != rank:
                exchanges[rank][position].append(Transfer(False, taken))
    return exchanges


def lists_of(name: str, stages: int, chunks: int, microbatches: int) -> Lists:
    return [schedule_for(name, rank, stages, chunks, microbatches) for rank in range(stages)]


def published_bubble(name: str, p: int, v: int, m: int, costs: Costs) -> float | None:
    f, i, w = costs[:3]
    if name in ("gpipe", "1f1b", "1f1b-vocab"):
        return (p - 1) * (f + i + w)
    if name == "interleaved":
        return (p - 1) * (f + i + w) / v if m >= p or v == 1 else None
    if name == "zb-h1":
        return (p - 1) * (f + i - w) if m >= p else None
    return 0.0 if m >= 2 * p - 1 and f == i == w else None


@pytest.mark.parametrize("costs", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_with_the_memory_and_bubble_published(name: str, stages: int, costs: Costs) -> None:
    sweep = [*range(1, 18), 23, 32] if costs is EVEN else [stages, 2 * stages + 1, 16]
    for chunks, microbatches in itertools.product(CHUNKS.get(name, (1,)), sweep):
        report = check_schedule(name, stages, chunks, microbatches, costs)
        bubble = published_bubble(name, stages, chunks, microbatches, costs)
        at = (chunks, microbatches)
        if bubble is not None:
            assert report.timeline.bubble == bubble, at
        if bubble is not None or stages == 1:
            assert report.bubble_formula == report.timeline.bubble, at
        total = sum(report.timeline.busy)
        work = costs.whole + (costs.head if name == "1f1b-vocab" else 0)
        assert total == stages * microbatches * work, at
        if name != "zb-v":
            assert report.timeline.makespan == microbatches * work + report.timeline.bubble, at


@pytest.mark.parametrize("name", SCHEDULES)
def test_larger_ones_run_too(name: str) -> None:
    for stages, microbatches in ((16, 33), (12, 64), (3, 200)):
        chunks = {"interleaved": 3, "zb-v": 2}.get(name, 1)
        report = check_schedule(name, stages, chunks, microbatches, EVEN)
        assert report.timeline.bubble == published_bubble(name, stages, chunks, microbatches, EVEN)


def test_peaks_of_the_papers() -> None:
    def peaks(name: str, chunks: int, microbatches: int) -> list[int]:
        return [peak(actions) for actions in lists_of(name, 4, chunks, microbatches)]

    assert peaks("gpipe", 1, 9) == [9, 9, 9, 9]
    assert peaks("1f1b", 1, 9) == [4, 3, 2, 1]
    assert peaks("interleaved", 2, 8) == [11, 9, 7, 5]  # warm-up 2 (p - r - 1) + (v - 1) p, and one more
    assert peaks("interleaved", 2, 4) == [8, 8, 7, 5]  # all there are
    assert peaks("zb-h1", 1, 9) == [4, 4, 4, 4]
    assert peaks("1f1b-vocab", 1, 9) == [6, 4, 3, 1]  # half as many again: what ranks that meet every time need
    assert peaks("zb-v", 2, 9) == [8, 8, 8, 8]  # of half stages: four whole ones, as the first rank of 1F1B


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_missing_or_repeated_action_is_found(name: str) -> None:
    chunks = {"interleaved": 2, "zb-v": 2}.get(name, 1)
    lists, placement = lists_of(name, 3, chunks, 5), placement_for(name, 3, chunks)
    check_lists(lists, placement, 5)
    for rank, actions in enumerate(lists):
        for position, action in enumerate(actions):
            for changed in (
                actions[:position] + actions[position + 1 :],
                [*actions[: position + 1], action, *actions[position + 1 :]],
                [*actions, action],
                [*actions[:position], action._replace(microbatch=5), *actions[position + 1 :]],
                [*actions[:position], action._replace(chunk=chunks), *actions[position + 1 :]],
            ):
                with pytest.raises(InvalidSchedule) as caught:
                    check_lists([*lists[:rank], changed, *lists[rank + 1 :]], placement, 5)
                assert caught.value.rank == rank


@pytest.mark.parametrize("name", SCHEDULES)
def test_swapping_what_depends_on_each_other_is_found(name: str) -> None:
    chunks = {"interleaved": 2, "zb-v": 2}.get(name, 1)
    lists, placement = lists_of(name, 3, chunks, 5), placement_for(name, 3, chunks)
    for rank, actions in enumerate(lists):
        for a, b in itertools.combinations(range(len(actions)), 2):
            if actions[a][1:] == actions[b][1:]:
                changed = actions.copy()
                changed[a], changed[b] = actions[b], actions[a]
                with pytest.raises(InvalidSchedule) as caught:
                    check_lists([*lists[:rank], changed, *lists[rank + 1 :]], placement, 5)
                assert (caught.value.rank, caught.value.position) == (rank, a)


def test_any_swap_of_neighbours_on_one_rank_of_1f1b_is_found() -> None:
    """By its own order, by the order of the messages, by a deadlock, by memory or by the bubble."""
    placement = Placement(3)
    for rank in range(3):
        for position in range(9):
            lists = [one_f_one_b(r, 3, 5) for r in range(3)]
            changed = lists[rank]
            changed[position], changed[position + 1] = changed[position + 1], changed[position]
            with pytest.raises(InvalidSchedule):
                timeline = check_lists(lists, placement, 5, EVEN)
                check_exchanges(just_in_time(lists, placement), lists, placement, "executor")
                check_peak(changed, rank, 3 - rank)
                if timeline.bubble != 2 * EVEN.whole:
                    raise InvalidSchedule(rank, position, "", "bubble")


def test_the_message_names_the_first_offending_action() -> None:
    for actions, message in (
        ([Action("H", 0), Action("F", 0)], r"action 0 \(H of .*\): comes before its forward"),
        (
            [Action("F", 0), Action("B", 0), Action("B", 0)],
            r"rank 3, action 2 \(B of micro-batch 0, chunk 0\): comes tw",
        ),
        ([Action("B", 0), Action("F", 0)], r"action 0 \(B of .*\): comes before its forward"),
        ([Action("F", 0), Action("W", 0), Action("I", 0)], r"action 1 \(W of .*\): comes before its input gradient"),
        ([Action("F", 0), Action("B", 0), Action("W", 0)], r"action 2 \(W of .*\): comes twice"),
        ([Action("F", 0), Action("B", 0), Action("I", 0)], r"action 2 \(I of .*\): comes twice"),
        ([Action("F", 0), Action("I", 0)], r"action 2 \(B or W of micro-batch 0, chunk 0\): is missing"),
        ([Action("F", 0)], r"action 1 \(B or I of micro-batch 0, chunk 0\): is missing"),
        ([Action("F", 1)], r"action 0 \(F of micro-batch 1, .*\): there are 1 micro-batches and 1 chunks"),
        ([Action("X", 0)], r"the kind is none of F, H, B, I, W"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidSchedule, match=message):
            check_complete(actions, 3, 1, 1)


def test_too_much_memory_is_found_where_it_is_exceeded() -> None:
    actions = schedule_for("gpipe", 0, 4, 1, 6)
    with pytest.raises(InvalidSchedule, match=r"rank 1, action 3 \(F of micro-batch 3, chunk 0\): 4 .* above 3"):
        check_peak(actions, 1, expected_peak("1f1b", 1, 4, 1, 6))
    with pytest.raises(InvalidSchedule, match="at most 6 are in flight, not 7"):
        check_peak(actions, 1, 7)


def test_a_bubble_that_is_not_the_formula_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    late = [Action(kind, i) for kind, i in (("F", 0), ("F", 1), ("B", 0), ("B", 1), ("F", 2), ("B", 2))]  # type: ignore[arg-type]
    monkeypatch.setattr(schedule_check, "all_lists", lambda *numbers: [late, one_f_one_b(1, 2, 3)])
    with pytest.raises(InvalidSchedule, match=r"the bubble is 6, not \(p-1\)\(F\+I\+W\) = 3"):
        check_schedule("1f1b", 2, 1, 3)


def test_ranks_that_wait_for_each_other_are_found() -> None:
    backward_first = [Action("F", 0), Action("B", 0), Action("F", 1), Action("B", 1)]
    forward_first = [Action("F", 0), Action("F", 1), Action("B", 0), Action("B", 1)]
    with pytest.raises(InvalidSchedule, match=r"rank 0, action 1 \(B of .* 0, chunk 0\): waits for ever .* rank 1"):
        simulate([backward_first, forward_first], Placement(2))
    exchanges = just_in_time([backward_first, forward_first], Placement(2))
    for manner in MANNERS:
        with pytest.raises(InvalidSchedule, match=r"before B of micro-batch 0.* deadlock: .*; ranks 0 -> 1 -> 0"):
            check_exchanges(exchanges, [backward_first, forward_first], Placement(2), manner)


def test_1f1b_deadlocks_if_a_send_blocks_the_receive_beside_it() -> None:
    """Why the executor posts both in one batch, and why planned exchanges have an order."""
    lists = lists_of("1f1b", 2, 1, 2)
    exchanges = just_in_time(lists, Placement(2))
    check_exchanges(exchanges, lists, Placement(2), "executor")
    with pytest.raises(InvalidSchedule, match=r"rank 0, .* waits to send activations of micro-batch 1 .* 0 -> 1 -> 0"):
        check_exchanges(exchanges, lists, Placement(2), "blocking")
    check_exchanges(planned(lists, Placement(2)), lists, Placement(2), "blocking")


def test_interleaved_deadlocks_if_only_what_comes_next_is_received() -> None:
    """Batches follow each other: a send waits behind a receive whose message is made only after that send is taken."""
    lists, placement = lists_of("interleaved", 2, 2, 4), placement_for("interleaved", 2, 2)
    for manner in MANNERS:
        with pytest.raises(InvalidSchedule, match="deadlock"):
            check_exchanges(just_in_time(lists, placement), lists, placement, manner)
        check_exchanges(planned(lists, placement), lists, placement, manner)


def test_messages_out_of_order_between_two_ranks_are_found() -> None:
    """ZB-V sends activations and gradients down the same way; received as needed, they are mixed up."""
    lists, placement = lists_of("zb-v", 2, 2, 4), placement_for("zb-v", 2, 2)
    with pytest.raises(InvalidSchedule, match=r"takes (activations|gradients) of .*, but the other end has"):
        check_exchanges(just_in_time(lists, placement), lists, placement, "executor")


@pytest.mark.parametrize("manner", MANNERS)
def test_a_transfer_without_its_other_end_is_found(manner: schedule_check.Manner) -> None:
    lists = lists_of("1f1b", 3, 1, 4)
    for rank, gaps in enumerate(planned(lists, Placement(3))):
        for gap, transfers in enumerate(gaps):
            for dropped in range(len(transfers)):
                exchanges = planned(lists, Placement(3))
                del exchanges[rank][gap][dropped]
                with pytest.raises(InvalidSchedule):
                    check_exchanges(exchanges, lists, Placement(3), manner)


@pytest.mark.parametrize("name", SCHEDULES)
def test_planned_exchanges_come_in_time_and_need_buffers_by_the_stages_only(name: str) -> None:
    chunks = {"interleaved": 2, "zb-v": 2}.get(name, 1)
    most = []
    for microbatches in (16, 80):
        lists, placement = lists_of(name, 4, chunks, microbatches), placement_for(name, 4, chunks)
        exchanges = planned(lists, placement)
        for rank, (gaps, actions) in enumerate(zip(exchanges, lists, strict=True)):
            for position, action in enumerate(actions):
                taken, sent = placement.taken(rank, action), placement.sent(rank, action)
                key = ("F" if action.kind == "F" else "B", action.chunk, action.microbatch)
                if taken is not None and taken.source != rank:
                    came = [g for g, t in enumerate(gaps) for s, m in t if not s and (m.kind, *m[3:]) == key]
                    assert len(came) == 1 and came[0] <= position
                if sent is not None and sent.target != rank:
                    key = (key[0], sent.chunk, action.microbatch)
                    went = [g for g, t in enumerate(gaps) for s, m in t if s and (m.kind, *m[3:]) == key]
                    assert went == [position + 1]
        most.append(max(held(gaps, actions) for gaps, actions in zip(exchanges, lists, strict=True)))
    assert most[0] == most[1] <= 8


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
def test_evaluation_runs_the_forwards_without_deadlock_in_few_buffers(name: str, stages: int) -> None:
    for chunks in CHUNKS.get(name, (1,)):
        placement = placement_for(name, stages, chunks)
        for microbatches in (1, 2, 3, stages, 2 * stages + 1, 5 * stages):
            lists = forwards_of(lists_of(name, stages, chunks, microbatches))
            wanted = sorted(Action("F", i, chunk) for i in range(microbatches) for chunk in range(chunks))
            if name == "1f1b-vocab":
                wanted += [Action("H", i) for i in range(microbatches)]
            assert all(sorted(actions) == wanted for actions in lists)
            exchanges = planned(lists, placement)
            for manner in MANNERS:
                check_exchanges(exchanges, lists, placement, manner)
            assert all(held(gaps, actions) <= 2 * stages for gaps, actions in zip(exchanges, lists, strict=True))


def test_an_action_that_takes_what_has_not_been_received_is_found() -> None:
    lists = lists_of("1f1b", 2, 1, 2)
    exchanges = planned(lists, Placement(2))
    late = exchanges[1][0].pop()
    exchanges[1][1].insert(0, late)
    with pytest.raises(InvalidSchedule, match=r"rank 1, action 0 .*: takes activations of micro-batch 0 .* not been"):
        check_exchanges(exchanges, lists, Placement(2), "executor")


def test_lists_that_pile_up_messages_are_refused() -> None:
    """All forwards of a chunk before the next chunk's: what comes back waits, the more micro-batches the longer."""
    for microbatches in (4, 16):
        forwards = [Action("F", i, chunk) for chunk in (0, 1) for i in range(microbatches)]
        backwards = [Action("B", i, chunk) for chunk in (1, 0) for i in range(microbatches)]
        lists = [forwards + backwards] * 2
        if microbatches == 4:
            check_lists(lists, Placement(2, 2), microbatches)
            continue
        with pytest.raises(InvalidSchedule, match=r"\d+ received messages wait, more than 2 x stages \(2\)"):
            check_lists(lists, Placement(2, 2), microbatches)


def test_the_simulator_knows_latency_and_uneven_stages() -> None:
    lists = lists_of("gpipe", 3, 1, 1)
    assert simulate(lists, Placement(3)).makespan == 9
    assert simulate(lists, Placement(3), Costs(latency=0.5)).makespan == 9 + 4 * 0.5
    folded = lists_of("zb-v", 3, 2, 1)
    assert simulate(folded, placement_for("zb-v", 3, 2), Costs(2, 2, 2, latency=0.5)).ranks[0][-1].end == 14 + 8 * 0.5
    uneven = simulate(lists_of("1f1b", 2, 1, 4), Placement(2), Costs(shares=(1.0, 2.0)))
    assert uneven.busy == [12, 24] and uneven.makespan == 1 + 24 + 2
    assert check_schedule("1f1b", 2, 1, 4, Costs(latency=0.5)).bubble_formula is None


def test_ranks_that_share_a_head_meet_in_one_order() -> None:
    lists = lists_of("1f1b-vocab", 3, 1, 4)
    check_lists(lists, Placement(3), 4)
    for rank, actions in enumerate(lists):
        first, second = actions.index(Action("H", 1)), actions.index(Action("H", 2))
        changed = actions.copy()
        changed[first], changed[second] = Action("H", 2), Action("H", 1)
        with pytest.raises(InvalidSchedule):
            check_lists([*lists[:rank], changed, *lists[rank + 1 :]], Placement(3), 4)


def test_a_shared_head_beats_the_best_uneven_split_of_a_large_vocabulary() -> None:
    """PolyLM 1.7B on eight stages: 24 layers and a head of 8.9, which is more than any stage should carry."""
    stages, microbatches, layers, head = 8, 64, 24, 8.9
    split = [float(count) for count in split_layers([1.0] * layers, 0.0, head, stages)]
    split[-1] += head
    alone = simulate(lists_of("1f1b", stages, 1, microbatches), Placement(stages), Costs(shares=tuple(split)))
    shared = Costs(shares=(layers / stages,) * stages, head=3 * head / stages)
    together = simulate(lists_of("1f1b-vocab", stages, 1, microbatches), Placement(stages), shared)
    assert sum(alone.busy) == pytest.approx(sum(together.busy))
    assert together.makespan < 0.5 * alone.makespan


@pytest.mark.parametrize("manner", MANNERS)
def test_a_message_must_not_be_received_behind_a_meeting_that_it_is_sent_before(manner: schedule_check.Manner) -> None:
    lists = lists_of("1f1b-vocab", 2, 1, 3)
    exchanges = planned(lists, Placement(2))
    check_exchanges(exchanges, lists, Placement(2), manner)
    meeting = lists[0].index(Action("H", 1))
    gap = next(g for g in range(meeting + 1) for sends, message in exchanges[0][g] if not sends)
    late = next(transfer for transfer in exchanges[0][gap] if not transfer.sends)
    exchanges[0][gap].remove(late)
    exchanges[0][meeting + 1].insert(0, late)
    with pytest.raises(InvalidSchedule, match=r"takes a part of the head of .* 1 .*, but the other end has gradients"):
        check_exchanges(exchanges, lists, Placement(2), manner)
