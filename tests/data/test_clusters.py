"""Clusters are the connected components of pairs, however the pairs come, and keep their best document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.data.clean import clusters
from megapoly.data.clean.clusters import all_but_one, components, node, place_of, spanning_forest

PAIRS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60)


def array(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


def slow_components(pairs: list[tuple[int, int]]) -> set[frozenset[int]]:
    found: list[set[int]] = []
    for pair in pairs:
        joined = set(pair).union(*(c for c in found if c & set(pair)))
        found = [c for c in found if not c & joined] + [joined]
    return {frozenset(c) for c in found}


def as_sets(nodes: np.ndarray, labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(nodes[labels == label].tolist()) for label in set(labels.tolist())}


@given(PAIRS)
def test_components_are_those_of_a_slow_union(pairs: list[tuple[int, int]]) -> None:
    nodes, labels = components(array(pairs))
    assert nodes.tolist() == sorted({end for pair in pairs for end in pair})
    assert as_sets(nodes, labels) == slow_components(pairs)
    assert all(labels[label] == label <= i for i, label in enumerate(labels)), "a label is its component's first node"


@pytest.mark.parametrize("shape", ["chain", "shuffled chain", "star around the last", "zigzag"])
def test_a_long_component_is_one(shape: str) -> None:
    n = 50_000
    order = np.arange(n)
    if shape == "shuffled chain":
        order = np.random.default_rng(0).permutation(n)
    elif shape == "zigzag":
        order = np.stack([np.arange(n // 2), np.arange(n // 2, n)[::-1]], axis=1).ravel()
    pairs = np.stack([order[:-1], np.full(n - 1, n - 1) if shape.startswith("star") else order[1:]], axis=1)
    nodes, labels = components(pairs.astype(np.uint64))
    assert len(nodes) == n and not labels.any()


@given(PAIRS, st.lists(st.integers(0, 60), max_size=5), st.integers(1, 20))
def test_a_forest_in_parts_has_the_same_components(pairs: list[tuple[int, int]], cuts: list[int], least: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "LEAST", least)
        forest = spanning_forest(np.split(array(pairs), sorted(min(cut, len(pairs)) for cut in cuts)))
    joined = {c for c in slow_components(pairs) if len(c) > 1}
    assert as_sets(*components(forest)) == joined
    assert len(forest) == sum(len(c) - 1 for c in joined)


@given(PAIRS, st.lists(st.integers(0, 3), min_size=41, max_size=41))
def test_the_best_of_each_stays_and_ties_go_by_order(pairs: list[tuple[int, int]], keys: list[int]) -> None:
    ranks = np.array(keys)
    dropped = all_but_one(array(pairs), lambda nodes: [ranks[nodes.astype(int)], ranks[nodes.astype(int)] * 0])
    kept = {min(c, key=lambda i: (keys[i], i)) for c in slow_components(pairs)}
    assert dropped.tolist() == sorted({end for pair in pairs for end in pair} - kept)


def test_the_first_key_weighs_most() -> None:
    def ranked(nodes: np.ndarray) -> list[np.ndarray]:
        return [np.array([1, 0, 0]), np.array([0, 2, 1])]

    assert all_but_one(array([(0, 1), (1, 2)]), ranked).tolist() == [0, 1]


def test_a_node_is_a_task_and_a_place() -> None:
    nodes = node(np.array([0, 1, 2**32 - 1]), np.array([5, 0, 2**32 - 1]))
    assert nodes.tolist() == [5, 2**32, 2**64 - 1]
    assert place_of(nodes).tolist() == [5, 0, 2**32 - 1]


def test_no_more_pairs_are_held_than_documents_are_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # The bands of a corpus give the same pairs over and over.
    held = []
    monkeypatch.setattr(clusters, "LEAST", 16)
    monkeypatch.setattr(clusters, "components", lambda pairs: (held.append(len(pairs)), components(pairs))[1])
    chain = np.stack([np.arange(20), np.arange(1, 21)], axis=1).astype(np.uint64)
    assert len(spanning_forest(chain for _ in range(50))) == 20
    assert len(held) > 20 and max(held) <= 20 + 20 + 20
