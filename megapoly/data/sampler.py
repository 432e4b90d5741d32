"""The order of training data as a pure function: sample number -> (source, epoch, offset), without any index file.

Which source: every stage holds a Huffman tree (Huffman 1952) over its shares. A node hands n samples to its heavier
child as floor(ratio x n + phase), a two-way Bresenham line, so that both the counts of a prefix and the n-th sample
have closed forms. Each split rounds by at most 1/2, and Huffman's rule gives an inner child at most 2/3 of its parent,
so the roundings on any path add up to less than 1/2 + 3/2 = 2 samples. The phases of a stage start from the errors that
the stages before it left, so errors are paid back and do not add up over stages; until they are, a short table opens
the stage, which serves the largest deficit first and ends where the tree stands. All of it depends on shares and on the
past only, never on a stage's length: a longer or further stage leaves all earlier samples as they are.

Which slice: a source's k-th sample is in epoch k // slices, at the place where a keyed generalised Feistel cipher with
cycle walking (Black and Rogaway 2002) puts k % slices.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

# Ratios and errors are integers in units of 2^-62 sample: at 10^12 samples a ratio is off by less than 10^-6 samples.
ONE_BITS = 62
ONE = 1 << ONE_BITS
WORD = (1 << 64) - 1
LOW32 = (1 << 32) - 1
FEISTEL_ROUNDS = 6
# An opening lasts until the rarest source is due four times: then the tree has paid back what it was given to pay.
OPENING_TURNS = 4
LONGEST_OPENING = 4096
DEFICIT_BITS = 40
GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class StageTarget:
    """A stretch of `samples` samples in which each source has the given share; the shares add up to one."""

    samples: int
    shares: tuple[Fraction, ...]


# ------------------------------------------------------------------------------------------------ which source


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
        return min(max((self.ratio * n + self.phase) >> ONE_BITS, 0), n)

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
    parts, so that none bears it alone.
    """

    def __init__(self, shares: Sequence[Fraction], carried: Sequence[int]) -> None:
        members = [source for source, share in enumerate(shares) if share > 0]
        lasting = sum(carried[source] for source in members) // len(members)
        self.splits: list[Split] = []
        heap = [(shares[source], order, ~source, carried[source] - lasting) for order, source in enumerate(members)]
        heapq.heapify(heap)
        while len(heap) > 1:
            light, _, right, right_error = heapq.heappop(heap)
            heavy, _, left, left_error = heapq.heappop(heap)
            error = left_error + right_error
            ratio = int(heavy / (heavy + light) * ONE)
            phase = ((ratio * error) >> ONE_BITS) - left_error + ONE // 2
            self.splits.append(Split(left, right, ratio, phase))
            order = len(members) + len(self.splits)
            heapq.heappush(heap, (heavy + light, order, len(self.splits) - 1, error))
        self.root = heap[0][2]
        self.num_sources = len(shares)

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


def opening(shares: Sequence[Fraction], carried: Sequence[int], tree: Tree) -> Int64s:
    """Sources of a stage's first samples where errors were carried into it, else none.

    Always the largest deficit (Megatron-LM's blending) among the sources that have not reached the tree's counts at
    the opening's end. Where earlier stages left errors of both signs in one subtree, the tree alone would repair one
    leaf at the cost of its neighbours and could leave the bound of 2 samples (seen with stages of a few samples).
    """
    if not any(carried):
        return np.empty(0, np.int64)
    rarest = min(share for share in shares if share > 0)
    length = min(LONGEST_OPENING, math.ceil(OPENING_TURNS / rarest))
    remaining = tree.counts(length)
    rates = np.array([int(share * (1 << DEFICIT_BITS)) for share in shares], dtype=np.int64)
    deficits = np.array([-error >> (ONE_BITS - DEFICIT_BITS) for error in carried], dtype=np.int64)
    lowest = np.iinfo(np.int64).min // 2
    # A source that is finished falls out of reach of the maximum and stays there.
    deficits[np.array(remaining) == 0] = lowest
    chosen = np.empty(length, np.int64)
    for n in range(length):
        deficits += rates
        source = int(deficits.argmax())
        chosen[n] = source
        remaining[source] -= 1
        deficits[source] = deficits[source] - (1 << DEFICIT_BITS) if remaining[source] else lowest
    return chosen


class StageOrder:
    """The order of sources in one stage, unbounded in length: an opening, then the tree."""

    def __init__(self, shares: Sequence[Fraction], carried: Sequence[int]) -> None:
        self.tree = Tree(shares, carried)
        self.opening = opening(shares, carried, self.tree)
        self.opening_ordinals = np.empty_like(self.opening)
        for source in np.unique(self.opening):
            where = np.flatnonzero(self.opening == source)
            self.opening_ordinals[where] = np.arange(len(where))

    def item(self, n: int) -> tuple[int, int]:
        """The source of the stage's n-th sample and how many of its samples came before in the stage."""
        if n < len(self.opening):
            return int(self.opening[n]), int(self.opening_ordinals[n])
        return self.tree.item(n)

    def items(self, begin: int, end: int) -> list[tuple[int, Int64s, Int64s]]:
        """`item` for begin to end: for each source met, the positions counted from begin and its earlier samples."""
        split = min(max(len(self.opening), begin), end)
        sources, ordinals = self.opening[begin:split], self.opening_ordinals[begin:split]
        found = []
        for source in np.unique(sources):
            where = np.flatnonzero(sources == source)
            found.append((int(source), where, ordinals[where]))
        if split < end:
            for leaf, where, counts in self.tree.items(np.arange(split, end, dtype=np.int64)):
                found.append((leaf, where + (split - begin), counts))
        return found

    def counts(self, n: int) -> list[int]:
        """How many of the stage's first n samples come from each source."""
        if n < len(self.opening):
            return [int(count) for count in np.bincount(self.opening[:n], minlength=self.tree.num_sources)]
        return self.tree.counts(n)


# ------------------------------------------------------------------------------------------------- which slice


def mix(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection that scatters close 64-bit words."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def mix_all(words: Uint64s) -> Uint64s:
    """`mix` for an array; uint64 products wrap by themselves."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def grid(size: int) -> tuple[int, int]:
    """Rows and columns of the smallest near-square grid that holds `size` cells; fewer than a row stays empty."""
    rows = math.isqrt(size - 1) + 1
    return rows, -(-size // rows)


def permute(index: int, size: int, key: int) -> int:
    """Where the permutation of range(size) that `key` (64 bits) selects puts `index`."""
    rows, columns = grid(size)
    while True:
        row, column = divmod(index, columns)
        for step in range(0, 2 * FEISTEL_ROUNDS, 2):
            row = (row + mix((mix((key + step * GOLDEN) & WORD) + column) & WORD) % rows) % rows
            column = (column + mix((mix((key + (step + 1) * GOLDEN) & WORD) + row) & WORD) % columns) % columns
        index = row * columns + column
        if index < size:
            return index


def permute_all(index: Int64s, size: int, keys: Uint64s) -> Int64s:
    """`permute` for an array of indices with a key each."""
    rows, columns = (np.uint64(extent) for extent in grid(size))
    placed = index.astype(np.uint64)
    walking = np.arange(len(placed))
    while len(walking):
        key = keys[walking]
        row, column = np.divmod(placed[walking], columns)
        for step in range(0, 2 * FEISTEL_ROUNDS, 2):
            row = (row + mix_all(mix_all(key + np.uint64(step * GOLDEN & WORD)) + column) % rows) % rows
            column = (column + mix_all(mix_all(key + np.uint64((step + 1) * GOLDEN & WORD)) + row) % columns) % columns
        placed[walking] = row * columns + column
        walking = walking[placed[walking] >= size]
    return placed.astype(np.int64)


# ------------------------------------------------------------------------------------------------ both together


@dataclass(frozen=True)
class _Stage:
    begin: int
    end: int
    order: StageOrder
    served: tuple[int, ...]  # samples of each source before this stage


class Sampler:
    """The data order of a run as a pure function of the seed and the sample number.

    `slices_per_source[i]` is the number of slices of source i, at least 1 where any stage gives it a share.
    Every epoch of a source is a permutation of its slices. Raises IndexError beyond the last stage.
    """

    def __init__(self, slices_per_source: Sequence[int], stages: Sequence[StageTarget], seed: int) -> None:
        self.slices = list(slices_per_source)
        self.targets = list(stages)
        self._seed_key = mix(seed & WORD)
        self._stages: list[_Stage] = []
        served = [0] * len(self.slices)
        carried = [0] * len(self.slices)
        begin = 0
        for stage in self.targets:
            assert stage.samples > 0 and len(stage.shares) == len(self.slices), stage
            assert sum(stage.shares) == 1 and min(stage.shares) >= 0, stage
            assert all(slices > 0 for slices, share in zip(self.slices, stage.shares, strict=True) if share), stage
            order = StageOrder(stage.shares, carried)
            self._stages.append(_Stage(begin, begin + stage.samples, order, tuple(served)))
            for source, count in enumerate(order.counts(stage.samples)):
                served[source] += count
                carried[source] += count * ONE - round(stage.samples * stage.shares[source] * ONE)
            begin += stage.samples
        self._begins = [stage.begin for stage in self._stages]
        self.num_samples = begin

    def sample(self, n: int) -> tuple[int, int, int]:
        """Source, epoch and offset (slice of the source) of the n-th sample."""
        if not 0 <= n < self.num_samples:
            raise IndexError(f"sample {n} lies outside the plan's {self.num_samples} samples")
        stage = self._stages[bisect_right(self._begins, n) - 1]
        source, count = stage.order.item(n - stage.begin)
        epoch, index = divmod(stage.served[source] + count, self.slices[source])
        key = mix((self._source_key(source) + epoch * GOLDEN) & WORD)
        return source, epoch, permute(index, self.slices[source], key)

    def samples(self, begin: int, end: int) -> tuple[Int64s, Int64s, Int64s]:
        """Sources, epochs and offsets of samples begin to end, the end excluded; three int64 arrays of end - begin."""
        if not 0 <= begin <= end <= self.num_samples:
            raise IndexError(f"samples {begin} to {end} lie outside the plan's {self.num_samples} samples")
        sources, epochs, offsets = (np.empty(end - begin, np.int64) for _ in range(3))
        for stage in self._stages:
            first, last = max(begin, stage.begin), min(end, stage.end)
            if first >= last:
                continue
            for source, where, counts in stage.order.items(first - stage.begin, last - stage.begin):
                epoch, index = np.divmod(counts + stage.served[source], self.slices[source])
                shifts = epoch.astype(np.uint64) * np.uint64(GOLDEN)
                keys = mix_all(shifts + np.uint64(self._source_key(source)))
                where = where + (first - begin)
                sources[where] = source
                epochs[where] = epoch
                offsets[where] = permute_all(index, self.slices[source], keys)
        return sources, epochs, offsets

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples come from each source, in closed form."""
        if not 0 <= n <= self.num_samples:
            raise IndexError(f"a prefix of {n} samples exceeds the plan's {self.num_samples} samples")
        if n == 0:
            return [0] * len(self.slices)
        stage = self._stages[bisect_right(self._begins, n - 1) - 1]
        inside = stage.order.counts(n - stage.begin)
        return [before + count for before, count in zip(stage.served, inside, strict=True)]

    def quotas(self, n: int) -> list[Fraction]:
        """The exact quota of each source after n samples: the sum over stages of samples times share."""
        quotas = [Fraction(0)] * len(self.slices)
        for stage, target in zip(self._stages, self.targets, strict=True):
            inside = min(max(n - stage.begin, 0), target.samples)
            quotas = [quota + inside * share for quota, share in zip(quotas, target.shares, strict=True)]
        return quotas

    def _source_key(self, source: int) -> int:
        return mix((self._seed_key + (source + 1) * GOLDEN) & WORD)
