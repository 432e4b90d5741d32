"""The size of the global batch as a pure function of the samples seen: constant, or growing at the start of a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from megapoly.sections import TrainConfig


@dataclass(frozen=True)
class BatchSizes:
    """Batches of `final` sequences; before sample `ramp_samples` smaller ones.

    They begin at `start` and grow by `increment` after each of equal stretches of samples (Megatron-LM's
    `--rampup-batch-size`), the last of which ends at ramp_samples. Without a ramp start is final. Small batches early
    in training serve better for the same number of tokens (McCandlish et al. 2018, arXiv 1812.06162).
    """

    final: int
    start: int
    increment: int = 1
    ramp_samples: int = 0

    @classmethod
    def of(cls, t: TrainConfig) -> Self:
        """As the configuration says."""
        return cls(t.global_batch_size, *(t.rampup_batch_size or [t.global_batch_size]))

    def at(self, samples: int) -> int:
        """Size of the batch that begins with sample number `samples`."""
        if samples >= self.ramp_samples:
            return self.final
        return self.start + samples * self._num_increments // self.ramp_samples * self.increment

    def stretches(self, first: int = 0) -> Iterator[tuple[int, int, int | None]]:
        """(first sample, batch size, steps) of each stretch of equal batches from `first` on; the last has no end."""
        while (size := self.at(first)) < self.final:
            border = -(-((size - self.start) // self.increment + 1) * self.ramp_samples // self._num_increments)
            steps = -(-(border - first) // size)
            yield first, size, steps
            first += steps * size
        yield first, self.final, None

    def samples_after(self, steps: int, first: int = 0) -> int:
        """Sample number after so many whole batches from sample `first` on."""
        for begin, size, most in self.stretches(first):
            if most is None or steps <= most:
                return begin + steps * size
            steps -= most
        raise AssertionError("the last stretch has no end")

    def steps_until(self, end: int, first: int = 0) -> int:
        """Batches from sample `first` on that it takes to have seen `end` samples; the last may be short."""
        total = 0
        for begin, size, most in self.stretches(first):
            needed = -(-max(end - begin, 0) // size)
            if most is None or needed <= most:
                return total + needed
            total += most
        raise AssertionError("the last stretch has no end")

    def history(self, samples: int) -> list[tuple[int, int]]:
        """(first sample, batch size) of the stretches of a run's first `samples` samples."""
        return [(begin, size) for begin, size, _ in self.stretches() if begin < samples]

    @property
    def _num_increments(self) -> int:
        return (self.final - self.start) // self.increment

    def __str__(self) -> str:
        ramp = f" after a ramp of {self.start},{self.increment},{self.ramp_samples}" if self.start < self.final else ""
        return f"{self.final}{ramp}"
