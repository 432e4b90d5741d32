"""The plan to read: what each stage takes of each source and language, as the sampler really serves it."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megapoly.data.curriculum import Number, Plan, PlanStage
from megapoly.data.sources import language_of
from megapoly.errors import ConfigError

# More epochs than this cost quality (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models").
MANY_EPOCHS = 4
BAR_WIDTH = 40
CHUNK = 1 << 14  # samples whose places are looked up at once


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: per stage, source and language what is really served, in samples, tokens and epochs."""
    sampler = plan.sampler()
    stages = []
    before = [0] * len(plan.sources)
    for number, stage in enumerate(plan.stages):
        after = sampler.counts(stage.end_sample)
        stages.append(_stage_summary(plan, number, before, after))
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


def _stage_summary(plan: Plan, number: int, before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    stage = plan.stages[number]
    counts = [end - begin for begin, end in zip(before, after, strict=True)]
    text = plan.text(counts)
    rows = [
        {"source": source.name, "language": source.language, "kind": source.kind}
        | _served(plan, float(share), (count, total, source.slices), amount, sum(text))
        for source, share, count, total, amount in zip(
            plan.sources, plan.text_shares(stage.shares), counts, after, text, strict=True
        )
    ]
    served = plan.part_counts(counts)
    asked = plan.part_counts([stage.samples * share for share in stage.shares])
    languages = _language_rows(plan, stage, counts, after)
    return {
        "stage": stage.name,
        "begin_sample": stage.begin_sample,
        "end_sample": stage.end_sample,
        "tokens": stage.samples * plan.block_length,
        "text_tokens": round(sum(text) * plan.block_length),
        "seq_length": stage.seq_length,
        "settings": stage.settings,
        "ramp": _ramp(plan, stage),
        "sources": rows,
        "languages": languages,
        "share_by_language": {row["language"]: row["share"] for row in languages},
        "share_by_part": {part: float(amount / sum(text)) for part, amount in plan.part_counts(text).items()},
        "deviation_in_samples": {part: float(served[part] - asked[part]) for part in served},
        "non_english_share": plan.non_english_share(text),
    }


def _served(plan: Plan, planned: float, samples: tuple[int, int, int], amount: Number, whole: Number) -> dict[str, Any]:
    """Of samples (in the stage, so far, in an epoch) and an amount of text out of a whole, both in full samples."""
    count, total, slices = samples
    return {
        "share": float(amount / whole),
        "planned_share": planned,
        "tokens": round(amount * plan.block_length),
        "samples": count,
        "epochs": count / slices if count else 0.0,
        "epochs_so_far": total / slices if total else 0.0,
    }


def _language_rows(plan: Plan, stage: PlanStage, counts: Sequence[int], after: Sequence[int]) -> list[dict[str, Any]]:
    codes = [language_of(source) for source in plan.sources]
    text, shares = plan.text(counts), plan.text_shares(stage.shares)
    rows = []
    for code in dict.fromkeys(codes):
        own = [i for i, other in enumerate(codes) if other == code]
        count, total, slices = (sum(of[i] for i in own) for of in (counts, after, [s.slices for s in plan.sources]))
        planned, amount = float(sum(shares[i] for i in own)), sum(text[i] for i in own)
        rows.append({"language": code} | _served(plan, planned, (count, total, slices), amount, sum(text)))
    return rows


def _ramp(plan: Plan, stage: PlanStage) -> dict[str, Any] | None:
    """The non-English share of a ramp's first and last step, and their number; None for constant shares."""
    if len(stage.steps) == 1:
        return None
    first, last = (plan.non_english_share(plan.text(stage.steps[end].shares)) for end in (0, -1))
    return {"first": first, "last": last, "steps": len(stage.steps)}


def samples(plan: Plan, begin: int, end: int) -> Iterator[dict[str, Any]]:
    """Samples begin to end, one by one: what they are of, in which epoch, and which slice of the source."""
    sampler = plan.sampler()
    for first in range(begin, end, CHUNK):
        chunk = sampler.samples(first, min(first + CHUNK, end))
        for sample, (source, epoch, offset) in enumerate(zip(*(a.tolist() for a in chunk), strict=True), start=first):
            stage, name = plan.stages[plan.stage_at(sample)].name, plan.sources[source].name
            yield {"sample": sample, "stage": stage, "source": name, "epoch": epoch, "offset": offset}


def parse_range(text: str, num_samples: int) -> tuple[int, int]:
    """Begin and end of A:B, either left out or not; ConfigError for what is no range within the plan."""
    match = re.fullmatch(r"([0-9]{0,18}):([0-9]{0,18})", text)
    if not match:
        raise ConfigError(f"--samples ({text[:80]}) must be A:B, two sample numbers such as 0:100")
    begin, end = int(match[1] or 0), int(match[2] or num_samples)
    if not begin <= end <= num_samples:
        raise ConfigError(f"--samples ({text}) must be a range within the plan's {num_samples} samples")
    return begin, end


# ---------------------------------------------------------------------------------------------------------- as text


def describe(plan: Plan) -> str:
    """The plan as a table to read: what each stage takes from each source, what is left over or read too often."""
    facts = summary(plan)
    size = f"{facts['samples']:,} samples of {plan.block_length:,} tokens ({facts['tokens']:,} tokens)"
    lines = [f"{len(plan.stages)} stages, {size}, seed {plan.seed}, fingerprint {facts['fingerprint']}"]
    for stage in facts["stages"]:
        lines += ["", *_stage_lines(stage, plan.block_length)]
    packed = [
        f"{source.name} {source.slices:,} rows, {float(source.fullness(plan.block_length)):.2%} full"
        for source in plan.sources
        if source.packed
    ]
    if packed:
        lines += ["", *_wrapped(f"packed: {', '.join(packed)}; shares and tokens are of text, without the padding")]
    if tails := ", ".join(f"{source.name} {source.dropped_tokens}" for source in plan.sources if source.dropped_tokens):
        lines += ["", *_wrapped(f"tails too short for a slice, not read (tokens): {tails}")]
    last = facts["stages"][-1]["sources"]
    lines += [
        f"warning: source '{row['source']}' is read {row['epochs_so_far']:.2f} epochs, more than {MANY_EPOCHS}"
        for row in last
        if row["epochs_so_far"] > MANY_EPOCHS
    ]
    lines += [f"warning: source '{row['source']}' is never read" for row in last if not row["epochs_so_far"]]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, subsequent_indent="  ", break_long_words=False)


def _stage_lines(stage: dict[str, Any], block_length: int) -> list[str]:
    parts = [
        f"{part} {share:.3%} ({stage['deviation_in_samples'][part]:+.2f} samples from its quota)"
        for part, share in stage["share_by_part"].items()
        if share
    ]
    read = [row for row in stage["languages"] if row["samples"]]
    is_news = len(read) < sum(row["samples"] > 0 for row in stage["sources"])
    text = f", {stage['text_tokens']:,} of them text" if stage["text_tokens"] != stage["tokens"] else ""
    return [
        f"{stage['stage']}: samples {stage['begin_sample']:,} to {stage['end_sample']:,} "
        f"({stage['tokens']:,} tokens{text})",
        *_setting_lines(stage, block_length),
        *_table(stage["sources"], ["source", "language", "kind"]),
        "  " + ", ".join(parts),
        *(_table(read, ["language"]) if is_news else []),
    ]


def _setting_lines(stage: dict[str, Any], block_length: int) -> list[str]:
    lines = []
    if ramp := stage["ramp"]:
        lines.append(f"  a ramp in {ramp['steps']} steps, non-English {ramp['first']:.2%} to {ramp['last']:.2%}")
    if stage["seq_length"] != block_length:
        lines.append(f"  each sample is {block_length // stage['seq_length']} sequences of {stage['seq_length']:,}")
    if stage["settings"]:
        lines.append("  its own: " + ", ".join(f"{key} {value}" for key, value in stage["settings"].items()))
    return lines


def _table(rows: Sequence[dict[str, Any]], words: list[str]) -> list[str]:
    """Rows as aligned columns: the words to the left of theirs, the numbers to the right, and a bar for the share."""
    table = [[*words, "share", "tokens", "samples", "epochs", "epochs so far", ""]]
    for row in rows:
        bar = ("#" * round(BAR_WIDTH * row["share"])).ljust(BAR_WIDTH)
        served = [f"{row['share']:.3%}", f"{row['tokens']:,}", f"{row['samples']:,}"]
        epochs = [_epochs(row["epochs"]), _epochs(row["epochs_so_far"])]
        table.append([*(row[word] for word in words), *served, *epochs, bar])
    return [f"  {line}" for line in aligned(table, len(words))]


def _epochs(number: float) -> str:
    return f"{number:.3f}" if number >= 0.001 or not number else "<0.001"


def aligned(table: Sequence[Sequence[str]], words: int) -> list[str]:
    """Rows as lines of columns: the first `words` to the left of theirs, the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for line in table:
        cells = zip(line, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return lines
