"""The size of the global batch as a pure function of the samples seen: growing at first, changing by stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from megapoly.data.curriculum import Plan
from megapoly.errors import ConfigError
from megapoly.sections import TrainConfig


@dataclass(frozen=True)
class Change:
    """From sample `begin` on batches of `size` samples; where it `cuts`, no batch reaches from before it beyond it."""

    begin: int
    size: int
    cuts: bool = False


@dataclass(frozen=True)
class BatchSizes:
    """Batches of `final` samples; before sample `ramp_samples` smaller ones, after each change its own.

    They begin at `start` and grow by `increment` after each of equal stretches of samples (Megatron-LM's
    `--rampup-batch-size`), the last of which ends at ramp_samples. Without a ramp start is final. Small batches early
    in training serve better for the same number of tokens (McCandlish et al. 2018, arXiv 1812.06162).
    """

    final: int
    start: int
    increment: int = 1
    ramp_samples: int = 0
    changes: tuple[Change, ...] = ()

    @classmethod
    def of(cls, t: TrainConfig, plan: Plan | None = None) -> Self:
        """As the configuration says; in samples, of which each makes one or several of a stage's sequences.

        Raises ConfigError for a ramp that a stage's own batches would cross.
        """
        stages = plan.stages if plan is not None else ()
        sizes = [
            (stage.settings.get("global_batch_size", t.global_batch_size) * stage.seq_length // plan.block_length)
            for stage in stages
            if plan is not None
        ] or [t.global_batch_size]
        changes = tuple(
            Change(stage.begin_sample, size, stage.seq_length != before.seq_length)
            for before, stage, size_before, size in zip(stages, stages[1:], sizes, sizes[1:], strict=False)
            if (stage.seq_length, size) != (before.seq_length, size_before)
        )
        ramp = t.rampup_batch_size
        if ramp is not None and (sizes[0] != t.global_batch_size or (changes and changes[0].begin < ramp[2])):
            raise ConfigError(
                f"rampup_batch_size {','.join(map(str, ramp))} must end before the first stage with a batch size or "
                "sequence length of its own begins; shorten it, or leave it out"
            )
        start, increment, samples = ramp or (sizes[0], 1, 0)
        return cls(sizes[0], start, increment, samples, changes)

    def at(self, samples: int) -> int:
        """Size of the batch that begins with sample number `samples`."""
        for change in reversed(self.changes):
            if samples >= change.begin:
                return change.size
        if samples >= self.ramp_samples:
            return self.final
        return self.start + samples * self._num_increments // self.ramp_samples * self.increment

    def end(self, samples: int) -> int:
        """Sample at which the batch that begins with number `samples` ends."""
        cut = next((c.begin for c in self.changes if c.cuts and c.begin > samples), None)
        end = samples + self.at(samples)
        return end if cut is None else min(end, cut)

    def stretches(self, first: int = 0) -> Iterator[tuple[int, int, int | None]]:
        """(first sample, batch size, steps) of each stretch of equal batches from `first` on; the last has no end."""
        while (border := self._border_after(first)) is not None:
            size = self.at(first)
            steps = -(-(border - first) // size)
            yield first, size, steps
            first = self.end(first + (steps - 1) * size)
        yield first, self.at(first), None

    def samples_after(self, steps: int, first: int = 0) -> int:
        """Sample number after so many batches from sample `first` on."""
        for begin, size, most in self.stretches(first):
            if most is None or steps < most:
                return begin + steps * size
            steps -= most
        raise AssertionError("the last stretch has no end")

    def steps_until(self, end: int, first: int = 0) -> int:
        """Batches from sample `first` on that it takes to have seen `end` samples; the last may be short."""
        total = 0
        for begin, size, most in self.stretches(first):
            needed = -(-max(end - begin, 0) // size)
            if most is None or needed == 0 or (needed <= most and end <= self.end(begin + (needed - 1) * size)):
                return total + needed
            total += most
        raise AssertionError("the last stretch has no end")

    def history(self, samples: int) -> list[tuple[int, int]]:
        """(first sample, batch size) of the stretches of a run's first `samples` samples."""
        return [(begin, size) for begin, size, _ in self.stretches() if begin < samples]

    def _border_after(self, sample: int) -> int | None:
        """The next sample from which on batches may have another size."""
        if sample < self.ramp_samples and (size := self.at(sample)) < self.final:
            return -(-((size - self.start) // self.increment + 1) * self.ramp_samples // self._num_increments)
        return next((change.begin for change in self.changes if change.begin > sample), None)

    @property
    def _num_increments(self) -> int:
        return (self.final - self.start) // self.increment

    def __str__(self) -> str:
        ramp = f" after a ramp of {self.start},{self.increment},{self.ramp_samples}" if self.start < self.final else ""
        later = "".join(f", {change.size} from sample {change.begin} on" for change in self.changes)
        return f"{self.final}{ramp}{later}"
