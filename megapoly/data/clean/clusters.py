"""Clusters of documents: connected components of pairs, in numpy, with memory for the documents in pairs alone.

A document is a node: the number of its task times 2^32, plus its place in that task.
"""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

Nodes = npt.NDArray[np.uint64]
Labels = npt.NDArray[np.int64]

LEAST = 1 << 22  # pairs that are gathered before they are thinned out


def node(task: int | npt.NDArray[np.integer], place: npt.NDArray[np.integer]) -> Nodes:
    """The nodes of documents."""
    return (np.asarray(task, dtype=np.uint64) << np.uint64(32)) | place.astype(np.uint64)


def place_of(nodes: Nodes) -> npt.NDArray[np.uint32]:
    """The places of documents in their tasks."""
    return nodes.astype(np.uint32)


def components(pairs: Nodes) -> tuple[Nodes, Labels]:
    """The nodes of pairs [n, 2] in order, and for each the index of the first node of its component.

    Every root hooks itself onto its smallest neighbour, then every node looks up its root; a few rounds suffice.
    """
    nodes, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    labels = np.arange(len(nodes))
    while len(ends):
        np.minimum.at(labels, ends.max(axis=1), ends.min(axis=1))
        while not np.array_equal(labels, higher := labels[labels]):
            labels = higher
        ends = labels[ends]
        ends = ends[ends[:, 0] != ends[:, 1]]
    return nodes, labels


def spanning_forest(blocks: Iterable[Nodes]) -> Nodes:
    """At most one pair a node, with the same components as all pairs of all blocks together."""
    forest, gathered, size = np.empty((0, 2), dtype=np.uint64), [], 0
    for block in blocks:
        gathered.append(block)
        size += len(block)
        if size >= max(LEAST, len(forest)):
            forest, gathered, size = _thinned([forest, *gathered]), [], 0
    return _thinned([forest, *gathered])


def _thinned(blocks: list[Nodes]) -> Nodes:
    nodes, labels = components(np.concatenate(blocks))
    is_child = labels != np.arange(len(nodes))
    return np.stack([nodes[is_child], nodes[labels[is_child]]], axis=1)


def all_but_one(forest: Nodes, ranked: Callable[[Nodes], list[npt.NDArray[np.integer]]]) -> Nodes:
    """The nodes of a forest without the best of each component, in order.

    `ranked` gives keys for nodes in order, the weightiest first, less is better; equal ones go by the node's order.
    """
    nodes, labels = components(forest)
    order = np.lexsort([*reversed(ranked(nodes)), labels])
    is_best = np.ones(len(nodes), dtype=bool)
    is_best[1:] = labels[order][1:] != labels[order][:-1]
    return np.sort(nodes[order][~is_best])
