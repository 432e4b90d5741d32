"""The data plan: which sources a run reads in which shares, stage by stage, checked before any training.

A source's stream is its files one after the other; its slice k is the tokens kL to kL + L inclusive (one of overlap for
the label), L the block length. A stage ends at sample ceil(cumulative tokens / L). `non_english_share` splits a stage's
tokens outside its `code_share` between sources of language en and all others, by weight within each part.
"""

import hashlib
import json
import math
import re
import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from megapoly.config import nearest
from megapoly.data.indexed import TokenStream
from megapoly.data.sampler import Sampler, StageTarget
from megapoly.errors import ConfigError, DataError
from megapoly.sections import Config, Source, Stage

# More epochs than this cost quality (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models").
MANY_EPOCHS = 4
Number = int | float | Fraction
KINDS = ("text", "parallel", "code")
ENGLISH, NON_ENGLISH, CODE = PARTS = ("English", "non-English", "code")
MOST_TOKENS = 1 << 60  # sample numbers stay far inside 64 bits
BAR_WIDTH = 40


def part_of(source: "Source | PlanSource") -> str:
    """The part of a stage that a source counts in; parallel text counts by its language, code apart."""
    return CODE if source.kind == "code" else ENGLISH if source.language == "en" else NON_ENGLISH


@dataclass(frozen=True)
class PlanSource:
    """A source as the plan reads it; `dropped_tokens` at its end fill no slice."""

    name: str
    language: str
    kind: str
    tokens: int
    slices: int
    dropped_tokens: int


@dataclass(frozen=True)
class PlanStage:
    """A stage in samples, the end excluded, with the exact share of each source."""

    name: str
    begin_sample: int
    end_sample: int
    shares: tuple[Fraction, ...]

    @property
    def samples(self) -> int:
        return self.end_sample - self.begin_sample


@dataclass(frozen=True)
class Plan:
    """Everything that decides the data order; a sample is `block_length` tokens."""

    sources: tuple[PlanSource, ...]
    stages: tuple[PlanStage, ...]
    block_length: int
    seed: int

    @property
    def num_samples(self) -> int:
        return self.stages[-1].end_sample

    def stage_at(self, sample: int) -> int:
        """Index of the stage that holds the sample; IndexError outside the plan."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} lies outside the plan's {self.num_samples} samples")
        return bisect_right([stage.end_sample for stage in self.stages], sample)

    @cached_property
    def _sampler(self) -> Sampler:
        targets = [StageTarget(stage.samples, stage.shares) for stage in self.stages]
        return Sampler([source.slices for source in self.sources], targets, self.seed)

    def sampler(self) -> Sampler:
        return self._sampler

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
            (min(stage.end_sample, end), [(i, str(share)) for i, share in enumerate(stage.shares) if share])
            for stage in self.stages
            if stage.begin_sample < end
        ]
        used = sorted({i for _, shares in stages for i, _ in shares})
        sources = [(i, self.sources[i].name, self.sources[i].tokens) for i in used]
        decisive = json.dumps([self.seed, self.block_length, sources, stages])
        return hashlib.blake2b(decisive.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------ making a plan


def open_sources(cfg: Config, vocab_size: int | None = None) -> list[TokenStream]:
    """The token stream of each source; DataError names the source and the file that is missing.

    With a vocab_size every read is checked against it.
    """
    streams = []
    for source in cfg.data.sources:
        if not source.paths:
            raise DataError(f"source '{source.name}' has no paths; give the prefixes of its .bin/.idx files")
        for path in (Path(prefix + suffix) for prefix in source.paths for suffix in (".idx", ".bin")):
            if not path.is_file():
                raise DataError(
                    f"source '{source.name}': no file {path}; make it with tools/prepare_corpus.py or "
                    "tools/preprocess_data.py, or point data_root at the folder that holds it"
                )
        streams.append(TokenStream(source.paths, vocab_size))
    return streams


def make_plan(cfg: Config, tokens_by_source: Sequence[int]) -> Plan:
    """Turn the data and curriculum sections into a plan; `tokens_by_source` counts each source's tokens in order.

    Raises ConfigError for a curriculum that contradicts itself, DataError for a source too small to be read.
    """
    sources, stages = cfg.data.sources, cfg.curriculum.stages
    if not sources:
        raise ConfigError("data.sources is empty: give at least one source with name, language and paths in the YAML")
    if not stages:
        raise ConfigError("curriculum.stages is empty: give at least one stage with name, tokens and shares")
    _refuse_duplicates("source", [source.name for source in sources])
    _refuse_duplicates("stage", [stage.name for stage in stages])
    length = _block_length(cfg)
    counted = zip(sources, tokens_by_source, strict=True)
    plan_sources = tuple(_plan_source(source, tokens, length) for source, tokens in counted)
    plan_stages: list[PlanStage] = []
    tokens = begin = 0
    for source in sources:
        _weight(source.weight, f"source '{source.name}': weight")
        _refuse_language(source)
        if source.kind not in KINDS:
            raise ConfigError(
                f"source '{source.name}': kind '{source.kind}' is unknown; {nearest(source.kind, list(KINDS))}"
            )
    for stage in stages:
        if stage.tokens < length:
            raise ConfigError(f"stage '{stage.name}': tokens ({stage.tokens}) is less than one slice of {length}")
        tokens += stage.tokens
        if tokens > MOST_TOKENS:
            raise ConfigError(f"stage '{stage.name}': the budgets add up to {tokens} tokens, more than {MOST_TOKENS}")
        end = -(-tokens // length)
        shares = _shares_by_weights(stage, sources) if stage.weights is not None else _shares_by_dial(stage, sources)
        _refuse_unreadable(stage, plan_sources, shares, length)
        plan_stages.append(PlanStage(stage.name, begin, end, shares))
        begin = end
    plan = Plan(plan_sources, tuple(plan_stages), length, cfg.train.seed)
    _refuse_many_epochs(plan, cfg.curriculum.max_epochs)
    return plan


def _refuse_duplicates(what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{what} '{name}' appears {names.count(name)} times: give each {what} its own name")


def _refuse_language(source: Source) -> None:
    """`EN` or `eng` would silently count as non-English."""
    code = re.split("[-_]", source.language.lower())[0]
    code = "en" if code in ("eng", "english") else code
    if code != source.language or not re.fullmatch("[a-z]{2,3}", code):
        fix = f"write '{code}'" if re.fullmatch("[a-z]{2,3}", code) else "write a code such as 'en' or 'ko'"
        raise ConfigError(f"source '{source.name}': language '{source.language}' is no lower-case code; {fix}")


def _block_length(cfg: Config) -> int:
    sequence = cfg.model.seq_length
    length = sequence if cfg.data.block_length is None else cfg.data.block_length
    if sequence < 1:
        raise ConfigError(f"seq_length ({sequence}) must be positive")
    if length != sequence:
        raise ConfigError(f"block_length ({length}) must for now equal seq_length ({sequence}): leave block_length out")
    return length


def _plan_source(source: Source, tokens: int, length: int) -> PlanSource:
    slices = max(tokens - 1, 0) // length
    dropped = tokens - (slices * length + 1) if slices else tokens
    return PlanSource(source.name, source.language, source.kind, tokens, slices, dropped)


def _weight(value: float, where: str) -> Fraction:
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{where} ({value}) must be a number of at least 0")
    # The decimal as written: 0.1 is 1/10.
    return Fraction(repr(value))


def _share(stage: Stage, name: str, value: float) -> Fraction:
    if not 0 <= value <= 1:
        raise ConfigError(f"stage '{stage.name}': {name} ({value}) must lie between 0 and 1")
    return Fraction(repr(value))


def _shares_by_weights(stage: Stage, sources: Sequence[Source]) -> tuple[Fraction, ...]:
    assert stage.weights is not None
    if stage.non_english_share is not None or stage.code_share:
        other = "non_english_share" if stage.non_english_share is not None else "code_share"
        raise ConfigError(f"stage '{stage.name}' gives weights and {other}: weights alone decide, remove one of them")
    names = [source.name for source in sources]
    for name in stage.weights:
        if name not in names:
            raise ConfigError(f"stage '{stage.name}': weights name an unknown source '{name}'; {nearest(name, names)}")
    weights = [_weight(stage.weights.get(name, 0.0), f"stage '{stage.name}': weight of '{name}'") for name in names]
    total = sum(weights)
    if not total:
        raise ConfigError(f"stage '{stage.name}': the weights add up to 0; give one source at least a weight above 0")
    return tuple(weight / total for weight in weights)


def _shares_by_dial(stage: Stage, sources: Sequence[Source]) -> tuple[Fraction, ...]:
    if stage.non_english_share is None:
        raise ConfigError(f"stage '{stage.name}' gives neither weights nor non_english_share; give one of them")
    code = _share(stage, "code_share", stage.code_share)
    dial = _share(stage, "non_english_share", stage.non_english_share)
    parts = {ENGLISH: (1 - code) * (1 - dial), NON_ENGLISH: (1 - code) * dial, CODE: code}
    weights = [_weight(source.weight, f"source '{source.name}': weight") for source in sources]
    members = [part_of(source) for source in sources]
    shares = [Fraction(0)] * len(sources)
    for part, share in parts.items():
        total = sum((weight for weight, member in zip(weights, members, strict=True) if member == part), Fraction(0))
        if share and not total:
            name, value = ("code_share", code) if part == CODE else ("non_english_share", dial)
            lack = f"all {part} sources have weight 0" if part in members else f"no source is {part}"
            raise ConfigError(
                f"stage '{stage.name}': {name} ({float(value):g}) needs a source that is {part}, but {lack}"
            )
        for i, member in enumerate(members):
            if member == part and share:
                shares[i] = share * weights[i] / total
    return tuple(shares)


def _refuse_unreadable(stage: Stage, sources: Sequence[PlanSource], shares: Sequence[Fraction], length: int) -> None:
    for source, share in zip(sources, shares, strict=True):
        if share and not source.slices:
            raise DataError(
                f"source '{source.name}' has {source.tokens} tokens, too few for one slice of {length} + 1, "
                f"but a share of {float(share):.4g} in stage '{stage.name}'; add text or give it weight 0"
            )


def _refuse_many_epochs(plan: Plan, max_epochs: float | None) -> None:
    if max_epochs is None:
        return
    if not max_epochs > 0:
        raise ConfigError(f"max_epochs ({max_epochs}) must be positive")
    for source, count in zip(plan.sources, plan.sampler().counts(plan.num_samples), strict=True):
        if count > max_epochs * source.slices:
            raise ConfigError(
                f"source '{source.name}' would be read {count / source.slices:.4g} epochs ({count} samples of "
                f"{source.slices} slices), more than max_epochs ({max_epochs:g}); lower its share or add text"
            )


# --------------------------------------------------------------------------------------------------- showing it


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: per stage and source what the sampler really serves, in samples, tokens and epochs."""
    sampler = plan.sampler()
    stages = []
    before = [0] * len(plan.sources)
    for stage in plan.stages:
        after = sampler.counts(stage.end_sample)
        stages.append(_stage_summary(plan, stage, before, after))
        before = after
    return {
        "samples": plan.num_samples,
        "tokens": plan.num_samples * plan.block_length,
        "block_length": plan.block_length,
        "seed": plan.seed,
        "fingerprint": plan.fingerprint(),
        "sources": [asdict(source) for source in plan.sources],
        "stages": stages,
    }


def _stage_summary(plan: Plan, stage: PlanStage, before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    counts = [end - begin for begin, end in zip(before, after, strict=True)]
    rows = [
        {
            "source": source.name,
            "language": source.language,
            "kind": source.kind,
            "share": count / stage.samples,
            "tokens": count * plan.block_length,
            "samples": count,
            "epochs": count / source.slices if count else 0.0,
            "epochs_so_far": total / source.slices if total else 0.0,
        }
        for source, count, total in zip(plan.sources, counts, after, strict=True)
    ]
    served = plan.part_counts(counts)
    asked = plan.part_counts([stage.samples * share for share in stage.shares])
    return {
        "stage": stage.name,
        "begin_sample": stage.begin_sample,
        "end_sample": stage.end_sample,
        "tokens": stage.samples * plan.block_length,
        "sources": rows,
        "share_by_language": _by_language(plan.sources, counts),
        "share_by_part": {part: count / stage.samples for part, count in served.items()},
        "deviation_in_samples": {part: float(served[part] - asked[part]) for part in served},
        "non_english_share": plan.non_english_share(counts),
    }


def _by_language(sources: Sequence[PlanSource], counts: Sequence[int]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for source, count in zip(sources, counts, strict=True):
        language = "code" if source.kind == "code" else source.language
        shares[language] = shares.get(language, 0.0) + count / sum(counts)
    return shares


def describe(plan: Plan) -> str:
    """The plan as a table to read: what each stage takes from each source, what is left over or read too often."""
    facts = summary(plan)
    size = f"{facts['samples']:,} samples of {plan.block_length:,} tokens ({facts['tokens']:,} tokens)"
    lines = [f"{len(plan.stages)} stages, {size}, seed {plan.seed}, fingerprint {facts['fingerprint']}"]
    for stage in facts["stages"]:
        lines += ["", *_stage_lines(stage)]
    if tails := ", ".join(f"{source.name} {source.dropped_tokens}" for source in plan.sources if source.dropped_tokens):
        text = f"tails too short for a slice, not read (tokens): {tails}"
        lines += ["", *textwrap.wrap(text, 120, subsequent_indent="  ", break_long_words=False)]
    last = facts["stages"][-1]["sources"]
    lines += [
        f"warning: source '{row['source']}' is read {row['epochs_so_far']:.2f} epochs, more than {MANY_EPOCHS}"
        for row in last
        if row["epochs_so_far"] > MANY_EPOCHS
    ]
    lines += [f"warning: source '{row['source']}' is never read" for row in last if not row["epochs_so_far"]]
    return "\n".join(lines)


def _stage_lines(stage: dict[str, Any]) -> list[str]:
    table = [["source", "language", "kind", "share", "tokens", "samples", "epochs", "epochs so far", ""]]
    for row in stage["sources"]:
        bar = ("#" * round(BAR_WIDTH * row["share"])).ljust(BAR_WIDTH)
        served = [f"{row['share']:.3%}", f"{row['tokens']:,}", f"{row['samples']:,}"]
        epochs = [f"{row['epochs']:.3f}", f"{row['epochs_so_far']:.3f}"]
        table.append([row["source"], row["language"], row["kind"], *served, *epochs, bar])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    # Words stand to the left of their column, numbers to the right.
    aligned = [
        [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in table
    ]
    parts = [
        f"{part} {share:.3%} ({stage['deviation_in_samples'][part]:+.2f} samples from its quota)"
        for part, share in stage["share_by_part"].items()
        if share
    ]
    languages = [f"{language} {share:.3%}" for language, share in stage["share_by_language"].items() if share]
    is_news = len(languages) < sum(row["samples"] > 0 for row in stage["sources"])
    return [
        f"{stage['stage']}: samples {stage['begin_sample']:,} to {stage['end_sample']:,} ({stage['tokens']:,} tokens)",
        *("  " + "  ".join(row).rstrip() for row in aligned),
        "  " + ", ".join(parts),
        *(["  by language: " + ", ".join(languages)] if is_news else []),
    ]
