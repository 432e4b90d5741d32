"""What differs between two data plans, and from which sample on: a changed plan may change what is to come alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import zip_longest

from megapoly.data.curriculum import Plan, PlanStage
from megapoly.data.shares import Shares

MOST_NAMED = 3  # of the sources whose share moved


@dataclass(frozen=True)
class PlanChange:
    """One difference, in words with the old and the new number; samples before number `since` do not know of it.

    What `decides` nothing about data and batches (a name, a learning rate) may differ in the past too.
    """

    since: int
    text: str
    decides: bool = True
    of_stage: bool = False  # another stage could have it from a later sample on

    def __str__(self) -> str:
        return self.text


def plan_changes(old: Plan, new: Plan) -> list[PlanChange]:
    """All differences, by the sample from which on they matter."""
    changes = [
        PlanChange(0, f"{name} was {was} and is {now}")
        for name, was, now in (("seed", old.seed, new.seed), ("block_length", old.block_length, new.block_length))
        if was != now
    ]
    changes += _source_changes(old, new)
    for ranges, others, text in (
        (new.left_out, old.left_out, "are left out"),
        (old.left_out, new.left_out, "were left out and are not"),
    ):
        gaps = _only_in(ranges, others)
        changes += [PlanChange(begin, f"samples {begin:,} to {end:,} {text}") for begin, end in gaps]
    for before, after in zip_longest(old.stages, new.stages):
        changes += [replace(change, of_stage=True) for change in _stage_changes(old, new, before, after)]
    return sorted(changes, key=lambda change: change.since)


def _only_in(ranges: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of some ranges is in no other, as ranges."""
    left = list(ranges)
    for begin, end in others:
        parts = [part for first, last in left for part in ((first, min(last, begin)), (max(first, end), last))]
        left = [(first, last) for first, last in parts if first < last]
    return left


def _first_read(plan: Plan, source: int) -> int:
    """The first sample of the first stage that reads a source; the plan's end where none does."""
    stretches = (stretch for stage in plan.stages for stretch in stage.stretches())
    return next((begin for begin, _, shares in stretches if shares[source]), plan.num_samples)


def _source_changes(old: Plan, new: Plan) -> list[PlanChange]:
    """A source is its place in the list (its order is drawn from it), its name and its tokens."""
    changes = []
    for i, (was, now) in enumerate(zip_longest(old.sources, new.sources)):
        since = min(_first_read(plan, i) for plan, there in ((old, was), (new, now)) if there is not None)
        if was is None or now is None:
            what = f"is new ({now.tokens:,} tokens)" if now is not None else "is gone"
            changes.append(PlanChange(since, f"source '{(now or was).name}' {what}"))
        elif was.name != now.name:
            changes.append(PlanChange(since, f"source number {i + 1} was '{was.name}' and is '{now.name}'"))
        elif was.tokens != now.tokens:
            text = f"source '{now.name}' had {was.tokens:,} tokens and has {now.tokens:,}"
            changes.append(PlanChange(since, text))
        elif (was.packed and was.slices) != (now.packed and now.slices):
            there, here = (f"{s.slices:,} packed rows" if s.packed else "not packed" for s in (was, now))
            changes.append(PlanChange(since, f"source '{now.name}' was {there} and is {here}"))
    return changes


def _stage_changes(old: Plan, new: Plan, was: PlanStage | None, now: PlanStage | None) -> list[PlanChange]:
    if was is None or now is None:
        stage, plan, verb = (now, new, "is new") if was is None else (was, old, "is gone")
        assert stage is not None
        text = f"stage '{stage.name}' {verb} ({_tokens(plan, stage)} tokens, non-English {_dial(plan, stage)})"
        return [PlanChange(stage.begin_sample, text)]
    begin = min(was.begin_sample, now.begin_sample)
    name = f"stage '{now.name}'"
    changes = []
    if was.name != now.name:
        changes.append(PlanChange(begin, f"stage '{was.name}' is named '{now.name}' now", decides=False))
    if (was.begin_sample, was.end_sample) != (now.begin_sample, now.end_sample):
        text = f"{name} had {_tokens(old, was)} tokens, to sample {was.end_sample:,}, and has {_tokens(new, now)}, "
        since = min(was.end_sample, now.end_sample) if was.begin_sample == now.begin_sample else begin
        changes.append(PlanChange(since, f"{text}to sample {now.end_sample:,}"))
    if (other := _first_other_share(was, now)) is not None:
        moved = _moved(old, new, was, now)
        is_longer = was.samples != now.samples and max(len(was.steps), len(now.steps)) > 1
        over = [f" over {_tokens(plan, stage)} tokens" * is_longer for plan, stage in ((old, was), (new, now))]
        text = f"{name} had {_dial(old, was)} non-English{over[0]} and has {_dial(new, now)}{over[1]}{moved}"
        changes.append(PlanChange(other, text))
    if was.seq_length != now.seq_length:
        changes.append(PlanChange(begin, f"{name}: seq_length was {was.seq_length} and is {now.seq_length}"))
    for key in dict.fromkeys((*was.settings, *now.settings)):
        there, here = was.settings.get(key), now.settings.get(key)
        if there != here and key != "seq_length":
            text = f"{name}: {key} was {'not given' if there is None else there} and is "
            decides = key in ("global_batch_size", "reset_optimizer")
            changes.append(PlanChange(begin, f"{text}{'not given' if here is None else here}", decides))
    return changes


def _first_other_share(was: PlanStage, now: PlanStage) -> int | None:
    """The first sample, of those that both stages have, at which the shares differ."""
    for (begin, end, shares), (other_begin, other_end, others) in zip(was.stretches(), now.stretches(), strict=False):
        if _by_place(shares) != _by_place(others):
            return min(begin, other_begin)
        if end != other_end:
            ends_both = end == was.end_sample and other_end == now.end_sample
            return None if ends_both else min(end, other_end)
    return None


def _by_place(shares: Shares) -> dict[int, Fraction]:
    """Shares by the source's number: a source that is appended and not read changes nothing."""
    return {i: share for i, share in enumerate(shares) if share}


def _moved(old: Plan, new: Plan, was: PlanStage, now: PlanStage) -> str:
    """The sources whose share of the stage moved most; where only padding moved, their share of the samples."""
    for what, before, after in (
        ("shares", old.text_shares(was.shares), new.text_shares(now.shares)),
        ("shares of samples", was.shares, now.shares),
    ):
        there = {source.name: float(share) for source, share in zip(old.sources, before, strict=True)}
        here = {source.name: float(share) for source, share in zip(new.sources, after, strict=True)}
        moves = [(name, there.get(name, 0.0), here.get(name, 0.0)) for name in {**there, **here}]
        seen = [move for move in moves if f"{move[1]:.4g}" != f"{move[2]:.4g}"]
        most = sorted(seen, key=lambda move: -abs(move[2] - move[1]))
        if most:
            shown = ", ".join(f"'{name}' {share:.4g} -> {other:.4g}" for name, share, other in most[:MOST_NAMED])
            return f" ({what}: {shown}{f' and {len(most) - MOST_NAMED} more' if len(most) > MOST_NAMED else ''})"
    return ""


def _tokens(plan: Plan, stage: PlanStage) -> str:
    return f"{stage.samples * plan.block_length:,}"


def _dial(plan: Plan, stage: PlanStage) -> str:
    first, last = (plan.non_english_share(plan.text(stage.steps[end].shares)) for end in (0, -1))
    return f"{first:.4g}" if len(stage.steps) == 1 else f"{first:.4g} to {last:.4g}"
