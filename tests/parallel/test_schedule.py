"""Schedules and splits as data: order, dependencies, memory, balance."""

import itertools

import pytest

from megapoly.config import load_config, preset_names
from megapoly.parallel.mesh import Axis
from megapoly.parallel.schedule import Action, one_f_one_b
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
            split = layer_split(cfg, cfg.tokenizer.vocab_size or 4096, stages)
            assert sum(split) == cfg.model.num_layers and 0 not in split[1:-1], (stages, split)
            assert max(split) - min(split[:-1]) <= 1, (stages, split)  # all but the head's stage are even


def test_stages_cover_the_layers_once() -> None:
    stages = [make_stage([2, 0, 3], Axis("pp", rank, 3)) for rank in range(3)]
    assert [list(s.layers) for s in stages] == [[0, 1], [], [2, 3, 4]]
    assert [s.has_embedding for s in stages] == [True, False, False]
    assert [s.has_head for s in stages] == [False, False, True]
