"""The data plan: which sources a run reads in which shares, stage by stage, checked before any training.

A source's stream is its files one after the other; its slice k is the tokens kL to kL + L inclusive (one of overlap for
the label), L the block length; of a packed source it is row k (packed.py). A sample is a slice; a stage with shorter
sequences walks its blocks in order. A stage ends at sample ceil(cumulative tokens / L). How a stage says its shares is
in `shares`.
"""

import dataclasses
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from megapoly.checks import block_length_of
from megapoly.data.indexed import PACK_NOTE, TokenStream
from megapoly.data.packed import PackedStream
from megapoly.data.sampler import Sampler, StageTarget
from megapoly.data.shares import WAYS, Mixture, Shares, ShareStep, share_steps
from megapoly.data.sources import ENGLISH, NON_ENGLISH, PARTS, PlanSource, part_of, plan_sources
from megapoly.errors import ConfigError, DataError
from megapoly.sections import Config, Source, Stage

Number = int | float | Fraction
MOST_TOKENS = 1 << 60  # sample numbers stay far inside 64 bits
DATA_KEYS = ("name", "tokens", "code_share", *WAYS)
SHOWN = 4  # of the sources that are wrong in the same way


@dataclass(frozen=True)
class PlanStage:
    """A stage in samples, the end excluded: its shares, step by step where they move, and sequences of what length.

    The shares are of samples; where sources are packed, those of text are others (`Plan.text_shares`). `settings` is
    what it says of optimization.
    """

    name: str
    begin_sample: int
    end_sample: int
    steps: tuple[ShareStep, ...]
    seq_length: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> int:
        return self.end_sample - self.begin_sample

    @cached_property
    def shares(self) -> Shares:
        """The exact share of each source in the whole stage."""
        if len(self.steps) == 1:
            return self.steps[0].shares
        columns = zip(*([step.samples * share for share in step.shares] for step in self.steps), strict=True)
        return tuple(sum(column, Fraction(0)) / self.samples for column in columns)

    def stretches(self) -> Iterator[tuple[int, int, Shares]]:
        """(first sample, end, shares) of each step."""
        begin = self.begin_sample
        for step in self.steps:
            yield begin, begin + step.samples, step.shares
            begin += step.samples


@dataclass(frozen=True)
class Plan:
    """Everything that decides the data order; a sample is `block_length` tokens."""

    sources: tuple[PlanSource, ...]
    stages: tuple[PlanStage, ...]
    block_length: int
    seed: int
    left_out: tuple[tuple[int, int], ...] = ()  # samples that are not trained on: ranges in order, ends excluded

    @property
    def num_samples(self) -> int:
        return self.stages[-1].end_sample

    def stage_at(self, sample: int) -> int:
        """Index of the stage that holds the sample; IndexError outside the plan."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} lies outside the plan's {self.num_samples} samples")
        return bisect_right([stage.end_sample for stage in self.stages], sample)

    def leaves_out(self, begin: int, end: int) -> bool:
        """Whether samples begin to end, begin < end, are left out, every one of them."""
        return any(first <= begin and end <= last for first, last in self.left_out)

    def sequences(self, stage: int) -> int:
        """Sequences that a sample makes in a stage."""
        return self.block_length // self.stages[stage].seq_length

    @cached_property
    def _stretches(self) -> list[tuple[int, int, Shares]]:
        return [stretch for stage in self.stages for stretch in stage.stretches()]

    @cached_property
    def _sampler(self) -> Sampler:
        targets = [StageTarget(end - begin, shares) for begin, end, shares in self._stretches]
        return Sampler([source.slices for source in self.sources], targets, self.seed)

    def sampler(self) -> Sampler:
        return self._sampler

    @cached_property
    def _fullness(self) -> list[Fraction] | None:
        """Part of each source's samples that is text; None where all of all is."""
        parts = [source.fullness(self.block_length) for source in self.sources]
        return None if all(part == 1 for part in parts) else parts

    def text(self, counts: Sequence[Number]) -> list[Number]:
        """Counts of samples by source as full samples: a packed source's in proportion to the text in its rows."""
        if self._fullness is None:
            return list(counts)
        return [count * part for count, part in zip(counts, self._fullness, strict=True)]

    def text_shares(self, counts: Sequence[Number]) -> list[Fraction]:
        """Shares of text by source for counts or shares of samples, which are not all 0."""
        found = [Fraction(amount) for amount in self.text(counts)]
        return [amount / sum(found) for amount in found]

    def planned_shares(self, begin: int, end: int) -> list[float]:
        """The share of text of each source that samples begin to end should have, begin < end."""
        sums = [0.0] * len(self.sources)
        first = bisect_right([stretch[1] for stretch in self._stretches], begin)
        for start, stop, shares in self._stretches[first:]:
            if start >= end:
                break
            samples = min(stop, end) - max(start, begin)
            sums = [total + samples * float(share) for total, share in zip(sums, shares, strict=True)]
        if self._fullness is not None:
            sums = [total * float(part) for total, part in zip(sums, self._fullness, strict=True)]
            return [total / sum(sums) for total in sums]
        return [total / (end - begin) for total in sums]

    def part_counts(self, counts: Sequence[Number]) -> dict[str, Number]:
        """Counts by source (samples or tokens) summed over English, non-English and code."""
        sums: dict[str, Number] = dict.fromkeys(PARTS, 0)
        for source, count in zip(self.sources, counts, strict=True):
            sums[part_of(source)] += count
        return sums

    def non_english_share(self, counts: Sequence[Number]) -> float:
        """Non-English part of counts by source (samples or tokens), without code, as the dial has it; 0 of nothing."""
        sums = self.part_counts(counts)
        total = sums[ENGLISH] + sums[NON_ENGLISH]
        return float(sums[NON_ENGLISH] / total) if total else 0.0

    def fingerprint(self, samples: int | None = None) -> str:
        """Hash (BLAKE2b) of all that decides the order of the first `samples` samples (default: of all).

        What comes later leaves it as it is: a plan that was made longer keeps the fingerprint of its past.
        """
        end = self.num_samples if samples is None else min(samples, self.num_samples)
        stages = [
            (min(stop, end), [(i, str(share)) for i, share in enumerate(shares) if share])
            for begin, stop, shares in self._stretches
            if begin < end
        ]
        used = sorted({i for _, shares in stages for i, _ in shares})
        sources = [
            (i, source.name, source.tokens, *([source.slices] if source.packed else []))
            for i, source in ((i, self.sources[i]) for i in used)
        ]
        left_out = [(first, min(last, end)) for first, last in self.left_out if first < end]
        decisive = json.dumps([self.seed, self.block_length, sources, stages, *([left_out] if left_out else [])])
        return hashlib.blake2b(decisive.encode(), digest_size=16).hexdigest()


def united(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges of samples in order, those that touch or overlap as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return tuple(joined)


# ------------------------------------------------------------------------------------------------ making a plan


def open_sources(cfg: Config, vocab_size: int | None = None) -> list[TokenStream]:
    """The token stream of each source; DataError names the source and the file that is missing.

    With a vocab_size every read is checked against it.
    """
    streams: list[TokenStream] = []
    length = block_length_of(cfg)
    for source in cfg.data.sources:
        if not source.paths:
            raise DataError(f"source '{source.name}' has no paths; give the prefixes of its .bin/.idx files")
        for path in (Path(prefix + suffix) for prefix in source.paths for suffix in (".idx", ".bin")):
            if not path.is_file():
                raise DataError(
                    f"source '{source.name}': no file {path}; make it with tools/prepare_corpus.py or "
                    "tools/preprocess_data.py, or point data_root at the folder that holds it"
                )
        if source.packed:
            streams.append(PackedStream(source.paths, length, vocab_size))
            continue
        if source.packed is None:
            _refuse_notes(source)
        streams.append(TokenStream(source.paths, vocab_size))
    return streams


def _refuse_notes(source: Source) -> None:
    """A packed set read as a stream would train on documents cut anywhere, without a word."""
    for path in source.paths:
        if os.path.exists(path + PACK_NOTE):
            raise DataError(
                f"source '{source.name}': {path} is packed ({path}{PACK_NOTE}); give the source `packed: true`, or "
                "`packed: false` to read it as a stream"
            )


def plan_for(cfg: Config, streams: Sequence[TokenStream]) -> Plan:
    """The plan over these sources as they lie on the disk; raises what make_plan raises."""
    return make_plan(cfg, [stream.num_tokens for stream in streams], [stream.num_rows for stream in streams])


def make_plan(cfg: Config, tokens_by_source: Sequence[int], rows_by_source: Sequence[int] | None = None) -> Plan:
    """Turn the data and curriculum sections into a plan over so many tokens, and rows where it is packed, by source.

    Raises ConfigError for a curriculum that contradicts itself, DataError for a source too small to be read.
    """
    sources, stages = cfg.data.sources, cfg.curriculum.stages
    if not sources:
        raise ConfigError("data.sources is empty: give at least one source with name, language and paths in the YAML")
    if not stages:
        raise ConfigError("curriculum.stages is empty: give at least one stage with name, tokens and shares")
    _refuse_duplicates("source", [source.name for source in sources])
    _refuse_duplicates("stage", [stage.name for stage in stages])
    length = block_length_of(cfg)
    counted = plan_sources(sources, tokens_by_source, rows_by_source or [0] * len(sources), length)
    taken: list[Fraction] = [Fraction(0)] * len(sources)
    plan_stages: list[PlanStage] = []
    tokens = begin = 0
    for stage in stages:
        if stage.tokens < length:
            raise ConfigError(f"stage '{stage.name}': tokens ({stage.tokens}) is less than one slice of {length}")
        tokens += stage.tokens
        if tokens > MOST_TOKENS:
            raise ConfigError(f"stage '{stage.name}': the budgets add up to more than 2^60 tokens")
        end = -(-tokens // length)
        steps = share_steps(Mixture(stage, sources, counted, length, end - begin, taken))
        for step in steps:
            taken = [total + step.samples * share for total, share in zip(taken, step.shares, strict=True)]
        seq_length = stage.seq_length or cfg.model.seq_length
        plan_stages.append(PlanStage(stage.name, begin, end, steps, seq_length, settings_of(stage)))
        begin = end
    plan = Plan(counted, tuple(plan_stages), length, cfg.train.seed)
    _refuse_many_epochs(plan, cfg.curriculum.max_epochs)
    return plan


def settings_of(stage: Stage) -> dict[str, Any]:
    """What a stage says of optimization, by key."""
    given = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    return {key: value for key, value in given.items() if key not in DATA_KEYS and value not in (None, False)}


def _refuse_duplicates(what: str, names: list[str]) -> None:
    for name in names:
        if not name.strip():
            raise ConfigError(f"a {what} has an empty name: give each {what} its own name")
        if names.count(name) > 1:
            raise ConfigError(f"{what} '{name}' appears {names.count(name)} times: give each {what} its own name")


def _refuse_many_epochs(plan: Plan, max_epochs: float | None) -> None:
    if max_epochs is None:
        return
    if not max_epochs > 0:
        raise ConfigError(f"max_epochs ({max_epochs}) must be positive")
    counts = zip(plan.sources, plan.sampler().counts(plan.num_samples), strict=True)
    over = [(source, count) for source, count in counts if count > max_epochs * source.slices]
    if over:
        over.sort(key=lambda pair: -pair[1] / pair[0].slices)
        shown = ", ".join(
            f"source '{source.name}' would be read {count / source.slices:.4g} epochs ({count} samples of "
            f"{source.slices} slices)"
            for source, count in over[:SHOWN]
        )
        more = f" and {len(over) - SHOWN} more" if len(over) > SHOWN else ""
        raise ConfigError(f"{shown}{more}, more than max_epochs ({max_epochs:g}); lower its share or add text")
