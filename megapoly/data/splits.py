"""Which source the n-th sample of a stage comes from, in closed form: a Huffman tree of two-way splits, and an opening.

A node hands n samples to its heavier child as floor(ratio x n + phase), a two-way Bresenham line, so that both the
counts of a prefix and the n-th sample have closed forms. Each split rounds by at most 1/2, and Huffman's rule (1952)
gives an inner child at most 2/3 of its parent, so the roundings on any path add up to less than 1/2 + 3/2 = 2 samples.
The phases of a stage start from the errors that the stages before it left, so errors are paid back and do not add up;
until they are, a short table opens the stage, which serves the largest deficit first and ends where the tree stands.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from megapoly.data.permutation import Int64s

# Ratios and errors are integers in units of 2^-62 sample: at 10^12 samples a ratio is off by less than 10^-6 samples.
ONE_BITS = 62
ONE = 1 << ONE_BITS
LOW32 = (1 << 32) - 1
# An opening lasts until the rarest source is due four times: then the tree has paid back what it was given to pay.
OPENING_TURNS = 4
LONGEST_OPENING = 4096
DEFICIT_BITS = 40
# largest_deficit_first below, or the extension's, which gives the same.
Fill = Callable[[Int64s, Int64s, Int64s, int], tuple[Int64s, Int64s]]


@dataclass(frozen=True)
class Weights:
    """Shares as whole numbers of `total`: exact as the fractions they come from, and much faster to compare and add."""

    weights: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, shares: Sequence[Fraction]) -> "Weights":
        """The shares over their common denominator."""
        total = lcm(*(share.denominator for share in shares))
        return cls(tuple(share.numerator * (total // share.denominator) for share in shares), total)

    def quota(self, source: int, samples: int) -> int:
        """round(samples x share x 2^62), a half to the even neighbour."""
        whole, rest = divmod(samples * self.weights[source] * ONE, self.total)
        return whole + (2 * rest > self.total or (2 * rest == self.total and whole % 2 == 1))


@dataclass(frozen=True)
class Split:
    """An inner node: of its first n samples the left child gets floor((ratio x n + phase) / 2^62), within 0 and n.

    A child >= 0 is another node's index, a child < 0 is the source ~child. The bounds hold back a child that earlier
    stages served too much; as both they and the line rise by 0 or 1 for each sample, so does their combination.
    """

    left: int
    right: int
    ratio: int
    phase: int

    def left_count(self, n: int) -> int:
        line = (self.ratio * n + self.phase) >> ONE_BITS
        return 0 if line < 0 else n if line > n else line

    def left_counts(self, n: Int64s) -> Int64s:
        """`left_count` for an array of n below 2^62: the product has 128 bits, taken here in limbs of 32."""
        whole, part = divmod(self.phase, ONE)
        n_high, n_low = n.astype(np.uint64) >> 32, n.astype(np.uint64) & LOW32
        r_high, r_low = self.ratio >> 32, self.ratio & LOW32
        low = n_low * r_low
        middle = n_high * r_low + (low >> 32)
        cross = n_low * r_high + (middle & LOW32)
        high = n_high * r_high + (middle >> 32) + (cross >> 32)
        low = (cross << 32) + (low & LOW32) + part
        high = high + (low < part)
        line = ((high << (64 - ONE_BITS)) | (low >> ONE_BITS)).astype(np.int64) + whole
        return np.minimum(np.maximum(line, 0), n)


class Tree:
    """The splits of one stage; `carried[i]` is what source i got too much before it, in units of 2^-62 sample.

    What the stage's sources together got too much cannot be paid back among them; they are led to bear it in equal
    parts, so that none bears it alone. A split comes after both its children.
    """

    def __init__(self, weights: Sequence[int], carried: Sequence[int]) -> None:
        members = [source for source, weight in enumerate(weights) if weight > 0]
        lasting = sum(carried[source] for source in members) // len(members)
        self.splits: list[Split] = []
        heap = [(weights[source], order, ~source, carried[source] - lasting) for order, source in enumerate(members)]
        heapq.heapify(heap)
        while len(heap) > 1:
            light, _, right, right_error = heapq.heappop(heap)
            heavy, _, left, left_error = heapq.heappop(heap)
            error = left_error + right_error
            ratio = heavy * ONE // (heavy + light)
            phase = ((ratio * error) >> ONE_BITS) - left_error + ONE // 2
            self.splits.append(Split(left, right, ratio, phase))
            order = len(members) + len(self.splits)
            heapq.heappush(heap, (heavy + light, order, len(self.splits) - 1, error))
        self.root = heap[0][2]
        self.num_sources = len(weights)

    def item(self, n: int) -> tuple[int, int]:
        """The source of the n-th sample and how many of its samples came before."""
        node = self.root
        while node >= 0:
            split = self.splits[node]
            left = split.left_count(n)
            if split.left_count(n + 1) > left:
                node, n = split.left, left
            else:
                node, n = split.right, n - left
        return ~node, n

    def items(self, n: Int64s) -> list[tuple[int, Int64s, Int64s]]:
        """`item` for an array: for each source met, the positions in the array and the source's earlier samples."""
        found = []
        pending = [(self.root, np.arange(len(n)), n)]
        while pending:
            node, where, n = pending.pop()
            if node < 0:
                found.append((~node, where, n))
                continue
            split = self.splits[node]
            left = split.left_counts(n)
            is_left = split.left_counts(n + 1) > left
            for child, chosen, count in ((split.left, is_left, left), (split.right, ~is_left, n - left)):
                if chosen.any():
                    pending.append((child, where[chosen], count[chosen]))
        return found

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples come from each source."""
        counts = [0] * self.num_sources
        pending = [(self.root, n)]
        while pending:
            node, n = pending.pop()
            if node < 0:
                counts[~node] = n
                continue
            split = self.splits[node]
            left = split.left_count(n)
            pending += [(split.left, left), (split.right, n - left)]
        return counts


def largest_deficit_first(rates: Int64s, deficits: Int64s, remaining: Int64s, steps: int) -> tuple[Int64s, Int64s]:
    """The sources of so many steps, and how often each came before; at every step the largest deficit is served.

    Deficits grow by `rates` a step and fall by 2^40 where served; a source that was served `remaining` times is out of
    reach from then on. `deficits` and `remaining` are used up.
    """
    lowest = np.iinfo(np.int64).min // 2
    served = [0] * len(rates)
    left = remaining.tolist()
    deficits[remaining == 0] = lowest
    sources, ordinals = np.empty(steps, np.int64), np.empty(steps, np.int64)
    for n in range(steps):
        deficits += rates
        source = int(deficits.argmax())
        sources[n], ordinals[n] = source, served[source]
        served[source] += 1
        left[source] -= 1
        deficits[source] = deficits[source] - (1 << DEFICIT_BITS) if left[source] else lowest
    return sources, ordinals


class StageOrder:
    """The order of sources in one stage: an opening where errors were carried into it, then the tree.

    In the opening always the largest deficit is served (Megatron-LM's blending) among the sources that have not reached
    the tree's counts at its end. Where earlier stages left errors of both signs in one subtree, the tree alone would
    repair one leaf at the cost of its neighbours and could leave the bound of 2 samples (seen with stages of a few
    samples). None of this depends on the stage's length, `samples`, but for how much of the opening is worked out.
    """

    def __init__(self, weights: Weights, carried: Sequence[int], samples: int, fill: Fill) -> None:
        self.tree = Tree(weights.weights, carried)
        self._weights, self._carried, self._samples, self._fill = weights, tuple(carried), samples, fill
        self.opening_length = 0
        if any(carried):
            rarest = min(weight for weight in weights.weights if weight)
            self.opening_length = min(LONGEST_OPENING, -(-OPENING_TURNS * weights.total // rarest))

    @cached_property
    def opening(self) -> tuple[Int64s, Int64s]:
        """Sources of the opening's samples and the earlier samples of each, as far as the stage reaches.

        Worked out at first use: the twin in numpy takes milliseconds for it.
        """
        steps = min(self.opening_length, self._samples)
        if not steps:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        total = self._weights.total
        rates = np.array([(weight << DEFICIT_BITS) // total for weight in self._weights.weights], np.int64)
        deficits = np.array([-error >> (ONE_BITS - DEFICIT_BITS) for error in self._carried], np.int64)
        remaining = np.array(self.tree.counts(self.opening_length), np.int64)
        return self._fill(rates, deficits, remaining, steps)

    def item(self, n: int) -> tuple[int, int]:
        """The source of the stage's n-th sample and how many of its samples came before in the stage."""
        if n < self.opening_length:
            sources, ordinals = self.opening
            return int(sources[n]), int(ordinals[n])
        return self.tree.item(n)

    def items(self, numbers: Int64s) -> list[tuple[int, Int64s, Int64s]]:
        """`item` for an array: for each source met, the positions in the array and the source's earlier samples."""
        is_opening = numbers < self.opening_length
        if not is_opening.any():
            return self.tree.items(numbers)
        early, late = np.flatnonzero(is_opening), np.flatnonzero(~is_opening)
        sources, ordinals = (column[numbers[early]] for column in self.opening)
        found = []
        for source in np.unique(sources):
            where = np.flatnonzero(sources == source)
            found.append((int(source), early[where], ordinals[where]))
        if len(late):
            found += [(source, late[where], counts) for source, where, counts in self.tree.items(numbers[late])]
        return found

    def counts(self, n: int) -> list[int]:
        """How many of the stage's first n samples come from each source."""
        if n < self.opening_length:
            return np.bincount(self.opening[0][:n], minlength=self.tree.num_sources).tolist()
        return self.tree.counts(n)
