"""The order of training data as a pure function: sample number -> (source, epoch, offset), without any index file.

Which source: every stage holds a tree of splits over its shares, which starts from the errors that the stages before it
left (splits.py). It depends on shares and on the past only, never on a stage's length: a longer or further stage leaves
all earlier samples as they are, and at every prefix each source is within 2 samples of its quota.

Which slice: a source's k-th sample is in epoch k // slices, at the place where a keyed permutation of the slices
(permutation.py) puts k % slices.

Batches are served by the extension in C++ where it is built, else by numpy: bit for bit the same, as `sample` in plain
Python is, the oracle of both.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from megapoly.data.native import NATIVE
from megapoly.data.permutation import GOLDEN, WORD, Int64s, mix, mix_all, permute, permute_all
from megapoly.data.splits import ONE, ONE_BITS, StageOrder, Weights, largest_deficit_first

MOST = 1 << 60  # samples of a plan, and slices of a source: sums of a few stay far inside 64 bits


@dataclass(frozen=True)
class StageTarget:
    """A stretch of `samples` samples in which each source has the given share; the shares add up to one."""

    samples: int
    shares: tuple[Fraction, ...]


@dataclass(frozen=True)
class _Stage:
    begin: int
    end: int
    order: StageOrder
    served: tuple[int, ...]  # samples of each source before this stage


class Sampler:
    """The data order of a run as a pure function of the seed and the sample number.

    `slices_per_source[i]` is the number of slices of source i, at least 1 where any stage gives it a share.
    `native`: take the extension (ImportError where it is not built) or numpy; None takes the extension where it is.
    Every epoch of a source is a permutation of its slices. Raises ValueError for more than 2^60 samples or slices, and
    IndexError beyond the last stage.
    """

    def __init__(
        self, slices_per_source: Sequence[int], stages: Sequence[StageTarget], seed: int, native: bool | None = None
    ) -> None:
        if native and NATIVE.module is None:
            raise ImportError(NATIVE.reason)
        self._module = None if native is False else NATIVE.module
        self.slices = [int(slices) for slices in slices_per_source]
        self.targets = list(stages)
        self.num_samples = sum(stage.samples for stage in self.targets)
        if max(self.slices) > MOST or self.num_samples > MOST:
            raise ValueError(f"{self.num_samples} samples of {max(self.slices)} slices: at most 2^60 can be ordered")
        self._seed, self._seed_key = seed, mix(seed & WORD)
        self._stages = list(self._orders())
        self._begins = [stage.begin for stage in self._stages]
        self._tables: dict[int, Any] = {}

    def _orders(self) -> Iterator[_Stage]:
        """The stages one after the other, each with what those before it left."""
        fill = largest_deficit_first if self._module is None else self._module.largest_deficit_first
        served, carried, begin = [0] * len(self.slices), [0] * len(self.slices), 0
        for stage in self.targets:
            assert stage.samples > 0 and len(stage.shares) == len(self.slices), stage
            assert all(slices > 0 for slices, share in zip(self.slices, stage.shares, strict=True) if share), stage
            weights = Weights.of(stage.shares)
            assert sum(weights.weights) == weights.total and min(weights.weights) >= 0, stage
            order = StageOrder(weights, carried, stage.samples, fill)
            yield _Stage(begin, begin + stage.samples, order, tuple(served))
            for source, count in enumerate(order.counts(stage.samples)):
                served[source] += count
                carried[source] += count * ONE - weights.quota(source, stage.samples)
            begin += stage.samples

    def __reduce__(self) -> tuple[Any, ...]:
        # The extension's tables stay behind and are built again where they are used.
        return Sampler, (self.slices, self.targets, self._seed, None if self._module is not None else False)

    @property
    def implementation(self) -> str:
        """Who serves batches, as a run says once."""
        return "numpy" if self._module is None else "C++"

    def describe(self) -> str:
        """One line for the log: who serves batches, and where it is numpy, why."""
        lack = f", the same but slower than C++, since {NATIVE.reason}" if NATIVE.module is None else ""
        return f"data order: {self.implementation}{lack}"

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
        first, last = (bisect_right(self._begins, n) - 1 for n in (begin, max(begin, end - 1)))
        parts = []
        for i in range(first, last + 1):
            stage = self._stages[i]
            parts.append(self._of_stage(i, max(begin, stage.begin) - stage.begin, min(end, stage.end) - stage.begin))
        if len(parts) == 1:
            return parts[0]
        sources, epochs, offsets = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return sources, epochs, offsets

    def _of_stage(self, i: int, begin: int, end: int) -> tuple[Int64s, Int64s, Int64s]:
        if self._module is not None:
            return self._native(i).samples(begin, end)
        return self._places(i, np.arange(begin, end, dtype=np.int64))

    def samples_at(self, numbers: npt.ArrayLike) -> tuple[Int64s, Int64s, Int64s]:
        """Sources, epochs and offsets of any samples in any order; `numbers` is a flat array of integers."""
        chosen = np.asarray(numbers)
        if chosen.ndim != 1 or (chosen.size and not np.issubdtype(chosen.dtype, np.integer)):
            raise TypeError(f"sample numbers must be a flat array of integers, not {chosen.dtype} {chosen.shape}")
        if chosen.size and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.num_samples:
            raise IndexError(
                f"samples {chosen.min()} to {chosen.max()} lie outside the plan's {self.num_samples} samples"
            )
        flat: Int64s = chosen.astype(np.int64)
        sources, epochs, offsets = (np.empty(len(flat), np.int64) for _ in range(3))
        stages = np.searchsorted(self._begins, flat, side="right") - 1
        for i in np.unique(stages).tolist():
            where = np.flatnonzero(stages == i)
            local = flat[where] - self._begins[i]
            found = self._places(i, local) if self._module is None else self._native(i).samples_at(local)
            sources[where], epochs[where], offsets[where] = found
        return sources, epochs, offsets

    def _places(self, i: int, numbers: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Sources, epochs and offsets of a stage's samples, in numpy."""
        sources, epochs, offsets = (np.empty(len(numbers), np.int64) for _ in range(3))
        for source, where, counts in self._stages[i].order.items(numbers):
            epoch, index = np.divmod(counts + self._stages[i].served[source], self.slices[source])
            keys = mix_all(epoch.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(self._source_key(source)))
            sources[where] = source
            epochs[where] = epoch
            offsets[where] = permute_all(index, self.slices[source], keys)
        return sources, epochs, offsets

    def _native(self, i: int) -> Any:
        """The extension's tables of a stage, made when it is first asked for."""
        if i not in self._tables:
            assert self._module is not None
            stage, order = self._stages[i], self._stages[i].order
            splits = order.tree.splits
            opening_sources, opening_ordinals = order.opening
            self._tables[i] = self._module.Stage(
                samples=stage.end - stage.begin,
                slices=np.array(self.slices, np.int64),
                keys=np.array([self._source_key(source) for source in range(len(self.slices))], np.uint64),
                served=np.array(stage.served, np.int64),
                root=order.tree.root,
                lefts=np.array([split.left for split in splits], np.int32),
                rights=np.array([split.right for split in splits], np.int32),
                ratios=np.array([split.ratio for split in splits], np.uint64),
                wholes=np.array([split.phase >> ONE_BITS for split in splits], np.int64),
                parts=np.array([split.phase & (ONE - 1) for split in splits], np.uint64),
                opening_sources=opening_sources,
                opening_ordinals=opening_ordinals,
            )
        return self._tables[i]

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
