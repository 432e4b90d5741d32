"""Schedules and splits as data: order, dependencies, memory, balance."""

import dataclasses
import itertools

import pytest

from megapoly.config import load_config, preset_names
from megapoly.errors import ConfigError
from megapoly.parallel.schedule import (
    SCHEDULES,
    Action,
    Placement,
    ScheduleError,
    group_sizes,
    one_f_one_b,
    placement_for,
    schedule_for,
)
from megapoly.parallel.stage import make_stage, split_layers
from megapoly.train.setup import layer_split


@pytest.mark.parametrize(("stages", "microbatches"), list(itertools.product((1, 2, 3, 4, 7), (1, 2, 3, 4, 8, 13))))
def test_1f1b_runs_all_in_dependency_order_without_deadlock(stages: int, microbatches: int) -> None:
    lists = [one_f_one_b(rank, stages, microbatches) for rank in range(stages)]
    for rank, actions in enumerate(lists):
        assert sorted(actions) == sorted(Action(k, i) for k in "FB" for i in range(microbatches))
        in_flight = most = 0
        for action in actions:
            in_flight += 1 if action.kind == "F" else -1
            most = max(most, in_flight)
        assert most == min(stages - rank, microbatches)
    # Run all ranks side by side: each takes its next action as soon as its neighbours have made what it needs.
    done: set[tuple[int, Action]] = set()
    places = [0] * stages
    while any(place < len(lists[rank]) for rank, place in enumerate(places)):
        moved = False
        for rank in range(stages):
            if places[rank] == len(lists[rank]):
                continue
            action = lists[rank][places[rank]]
            needs = [(rank - 1, action)] if action.kind == "F" and rank else []
            if action.kind == "B":
                needs = [(rank, Action("F", action.microbatch))] + ([(rank + 1, action)] if rank < stages - 1 else [])
            if all(need in done for need in needs):
                done.add((rank, action))
                places[rank] += 1
                moved = True
        assert moved, f"deadlock at {places}"


def listed(text: str) -> list[Action]:
    """Actions from kind, micro-batch and chunk letter, as tools/show_schedule.py writes them."""
    return [Action(word[0], int(word[1:].rstrip("ab")), int(word.endswith("b"))) for word in text.split()]  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "chunks", "microbatches", "expected"), [
    ("gpipe", 1, 3, ["F0 F1 F2 B0 B1 B2", "F0 F1 F2 B0 B1 B2"]),
    ("1f1b", 1, 3, ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]),
    ("interleaved", 1, 3, ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]),
    ("interleaved", 2, 4, [
        "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a",
        "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a",
    ]),
    ("interleaved", 2, 3, [  # one group of three
        "F0a F1a F2a F0b F1b F2b B0b B1b B2b B0a B1a B2a",
        "F0a F1a F2a F0b B0b F1b B1b F2b B2b B0a B1a B2a",
    ]),
    ("1f1b-vocab", 1, 3, ["F0 H0 F1 H1 F2 B0 H2 B1 B2", "F0 H0 B0 F1 H1 B1 F2 H2 B2"]),
    ("zb-h1", 1, 3, ["F0 F1 I0 W0 F2 I1 W1 I2 W2", "F0 I0 F1 I1 W0 F2 I2 W1 W2"]),
    ("zb-h1", 1, 1, ["F0 I0 W0", "F0 I0 W0"]),
    ("zb-v", 2, 4, [
        "F0a F1a F2a F0b I0b W0b F1b I1b W1b F3a I0a W0a F2b I2b W2b I1a W1a F3b I3b W3b I2a W2a I3a W3a",
        "F0a F0b F1a F1b I0b W0b F2a I0a W0a F2b I1b W1b F3a I1a W1a F3b I2b W2b I2a I3b I3a W2a W3b W3a",
    ]),
    ("zb-v", 2, 1, ["F0a F0b I0b W0b I0a W0a", "F0a F0b I0b W0b I0a W0a"]),
])  # fmt: skip
def test_small_schedules_by_hand(name: str, chunks: int, microbatches: int, expected: list[str]) -> None:
    assert [schedule_for(name, rank, 2, chunks, microbatches) for rank in range(2)] == [listed(t) for t in expected]


def test_an_action_is_of_chunk_0_unless_it_says_otherwise() -> None:
    assert Action("F", 3) == ("F", 3, 0)


@pytest.mark.parametrize(("name", "chunks"), [("Interleaved1F1B", 2), ("Interleaved1F1B", 3), ("ZBVZeroBubble", 2)])
@pytest.mark.parametrize(("stages", "groups"), [(2, 1), (2, 3), (3, 2), (4, 1), (4, 3)])
def test_the_order_is_that_of_torch(name: str, chunks: int, stages: int, groups: int) -> None:
    """Weight gradients apart, which may be at any place after the input's."""
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    theirs = visualizer.get_schedule_ops(name, stages, stages * groups, num_stages_per_rank=chunks)
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I"}
    ours = "zb-v" if name == "ZBVZeroBubble" else "interleaved"
    for rank, operations in enumerate(theirs):
        expected = [
            Action(kinds[op.computation_type.name], op.microbatch_index, op.stage_index // stages)  # type: ignore[arg-type]
            for op in operations
            if op is not None and op.computation_type.name in kinds
        ]
        actions = schedule_for(ours, rank, stages, chunks, stages * groups)
        assert [action for action in actions if action.kind != "W"] == expected


def test_groups_are_even_and_not_smaller_than_the_stages() -> None:
    for stages, microbatches in itertools.product(range(1, 9), range(1, 60)):
        groups = group_sizes(stages, microbatches)
        assert sum(groups) == microbatches
        assert max(groups) - min(groups) <= 1 and groups[0] == max(groups)
        assert min(groups) >= min(stages, microbatches) and (max(groups) < 2 * stages)
        assert microbatches % stages or set(groups) == {stages}


def test_chunks_are_dealt_out_in_rounds_or_folded_into_a_v() -> None:
    loop, fold = placement_for("interleaved", 3, 2), placement_for("zb-v", 3, 2)
    assert [[loop.stage_of(r, c) for c in range(2)] for r in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [[fold.stage_of(r, c) for c in range(2)] for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    for placement in (loop, fold, Placement(4, 3, folded=True)):
        for stage in range(placement.stages * placement.chunks):
            assert placement.stage_of(*placement.owner(stage)) == stage


def test_activations_go_up_the_stages_and_gradients_down() -> None:
    loop, fold = placement_for("interleaved", 3, 2), placement_for("zb-v", 3, 2)
    assert loop.taken(0, Action("F", 7)) is None and loop.sent(0, Action("F", 7)) == (0, 1, "F", 0, 7)
    assert loop.sent(2, Action("F", 7)) == (2, 0, "F", 1, 7) and loop.sent(2, Action("F", 7, 1)) is None
    assert loop.taken(2, Action("B", 7)) == (0, 2, "B", 0, 7) and loop.taken(2, Action("B", 7, 1)) is None
    assert fold.sent(2, Action("F", 7)) == (2, 2, "F", 1, 7) and fold.sent(1, Action("F", 7, 1)) == (1, 0, "F", 1, 7)
    assert fold.taken(2, Action("I", 7)) == (2, 2, "B", 0, 7) and fold.sent(0, Action("I", 7)) is None
    for kind in ("W", "H"):
        assert fold.taken(1, Action(kind, 7)) is None and fold.sent(1, Action(kind, 7)) is None


@pytest.mark.parametrize(("arguments", "message"), [
    (("zb-h2", 0, 2, 1, 4), r"schedule \(zb-h2\) must be one of gpipe, 1f1b, interleaved, zb-h1, zb-v"),
    (("1f1b", 0, 2, 3, 4), r"chunks \(3\) must be 1 for 1f1b; interleaved takes 3 chunks"),
    (("zb-v", 0, 2, 1, 4), r"chunks \(1\) must be 2 for zb-v"),
    (("gpipe", 0, 0, 1, 4), r"stages \(0\) must be at least 1"),
    (("interleaved", 0, 2, 0, 4), r"chunks \(0\) must be at least 1"),
    (("zb-h1", 0, 2, 1, -1), r"microbatches \(-1\) must be at least 1"),
    (("1f1b", 2, 2, 1, 4), r"rank \(2\) must lie in 0 to 1"),
])  # fmt: skip
def test_impossible_arguments_are_refused_with_their_numbers(
    arguments: tuple[str, int, int, int, int], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        schedule_for(*arguments)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, ConfigError)


def test_all_names_give_a_schedule() -> None:
    for name in SCHEDULES:
        assert schedule_for(name, 0, 1, 2 if name == "zb-v" else 1, 1)[0] == Action("F", 0)


def brute_force(costs: list[float], embedding: float, head: float, stages: int) -> float:
    best = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(costs) + 1), stages - 1):
        borders = [0, *cuts, len(costs)]
        loads = [sum(costs[a:b]) for a, b in itertools.pairwise(borders)]
        loads[0] += embedding
        loads[-1] += head
        best = min(best, max(loads))
    return best


@pytest.mark.parametrize(("layers", "stages", "embedding", "head"), [
    (4, 2, 0.0, 1.3), (7, 3, 0.5, 2.2), (6, 4, 0.0, 8.9), (5, 5, 1.0, 1.0), (9, 4, 3.0, 0.2), (3, 1, 1.0, 1.0),
])  # fmt: skip
def test_the_split_is_as_balanced_as_any(layers: int, stages: int, embedding: float, head: float) -> None:
    split = split_layers([1.0] * layers, embedding, head, stages)
    loads = [float(n) for n in split]
    loads[0] += embedding
    loads[-1] += head
    assert sum(split) == layers and len(split) == stages
    assert max(loads) == pytest.approx(brute_force([1.0] * layers, embedding, head, stages))


def test_polylms_head_takes_layers_from_the_last_stage() -> None:
    # A head of 256,000 entries weighs 8.9 layers at 1.7B and 3.9 at 13B.
    assert split_layers([1.0] * 24, 0.0, 8.9, 2) == [16, 8]
    assert split_layers([1.0] * 40, 0.0, 3.9, 4) == [11, 11, 11, 7]


def test_a_stage_between_first_and_last_is_never_empty() -> None:
    assert split_layers([1.0], 0.0, 0.0, 3) == [0, 1, 0]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_splits_over_any_number_of_stages_without_an_empty_one_between(name: str) -> None:
    cfg = load_config(name)
    for stages in (2, 3, 4, 5, 8, 10, 16):
        if stages <= cfg.model.num_layers:
            layout = dataclasses.replace(cfg.parallel, pipeline_model_parallel_size=stages, pipeline_layer_split=None)
            split = layer_split(dataclasses.replace(cfg, parallel=layout), cfg.tokenizer.vocab_size or 4096)
            assert sum(split) == cfg.model.num_layers and 0 not in split[1:-1], (stages, split)
            assert max(split) - min(split[:-1]) <= 1, (stages, split)  # all but the head's stage are even


def test_stages_cover_the_layers_once() -> None:
    stages = [make_stage([2, 0, 3], number) for number in range(3)]
    assert [list(s.layers) for s in stages] == [[0, 1], [], [2, 3, 4]]
    assert [s.has_embedding for s in stages] == [True, False, False]
    assert [s.has_head for s in stages] == [False, False, True]
