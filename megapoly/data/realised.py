"""What a run has read, by its own metrics.jsonl, beside its plan: shares and losses by stage and language."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megapoly.data.curriculum import Plan
from megapoly.data.plan_report import aligned
from megapoly.data.sources import language_of
from megapoly.errors import DataError

Row = dict[str, Any]
FIFTH = 5  # the first and the last loss of a stage are means over this part of its steps
KEYS = {"step": int, "samples": int, "stage": str, "tokens_by_source": dict, "loss_by_source": dict}


def read_rows(path: Path, plan: Plan) -> list[Row]:
    """The rows of metrics.jsonl, step after step; DataError names the line that is none of this plan's run."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a row that is being written is left out
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise DataError(f"{path}: cannot be read ({reason}); give the folder of a run that has begun") from None
    names, rows, samples = {source.name for source in plan.sources}, [], 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in KEYS.items()):
            raise DataError(f"{path}, line {number}: no step of a run; a resume of the run drops torn lines")
        if row["step"] != number or not samples < row["samples"] <= plan.num_samples:
            raise DataError(f"{path}, line {number}: step {row['step']} to sample {row['samples']} does not follow")
        if unknown := sorted(set(row["tokens_by_source"]) - names):
            raise DataError(f"{path}, line {number}: source '{unknown[0]}' is not in the plan")
        samples = row["samples"]
        rows.append({key: row[key] for key in KEYS})
    if not rows:
        raise DataError(f"{path}: holds no step; give the folder of a run that has begun")
    return rows


def stage_of(plan: Plan, rows: Sequence[Row], at: int) -> int:
    """The stage of row `at`: that of its step's first sample."""
    return plan.stage_at(rows[at - 1]["samples"] if at else 0)


def share_report(plan: Plan, rows: Sequence[Row], has_masked_labels: bool = False) -> dict[str, Any]:
    """Planned and realised shares, tokens and losses by language of each stage that has begun, as plain data.

    A step counts in the stage of its first sample, its plan is that of its own samples. `off_by_samples` is what was
    read beyond the plan; `steps_off_the_plan` are those whose tokens of some source are not those of the sampler's
    samples, None where masked labels, which are not counted, keep that from being told.
    """
    number_of = [stage_of(plan, rows, at) for at in range(len(rows))]
    ends = [0] + [row["samples"] for row in rows]
    reports = []
    for number, stage in enumerate(plan.stages):
        own = [at for at, other in enumerate(number_of) if other == number]
        if own:
            begin, end = ends[own[0]], ends[own[-1] + 1]
            of_stage, planned = [rows[at] for at in own], plan.planned_shares(begin, end)
            read = [sum(row["tokens_by_source"].get(s.name, 0) for row in of_stage) for s in plan.sources]
            reports.append(
                {
                    "stage": stage.name,
                    "samples": end - begin,
                    "steps": len(own),
                    "planned_non_english_share": plan.non_english_share(planned),
                    "non_english_share": plan.non_english_share(read),
                    "languages": _language_rows(plan, of_stage, planned, end - begin),
                }
            )
    return {
        "steps": len(rows),
        "samples": ends[-1],
        "of_samples": plan.num_samples,
        "steps_off_the_plan": None if has_masked_labels else _steps_off(plan, rows, ends),
        "stages": reports,
    }


def _steps_off(plan: Plan, rows: Sequence[Row], ends: Sequence[int]) -> list[int]:
    counts = [plan.sampler().counts(end) for end in ends]
    found = []
    for row, (before, after) in zip(rows, itertools.pairwise(counts), strict=True):
        wanted = [(b - a) * plan.block_length for a, b in zip(before, after, strict=True)]
        if wanted != [row["tokens_by_source"].get(source.name, 0) for source in plan.sources]:
            found.append(row["step"])
    return found


def _language_rows(plan: Plan, rows: Sequence[Row], planned: Sequence[float], samples: int) -> list[dict[str, Any]]:
    languages = [language_of(source) for source in plan.sources]
    share, tokens = dict.fromkeys(languages, 0.0), tokens_by_language(plan, rows)
    for language, part in zip(languages, planned, strict=True):
        share[language] += part
    total, end = sum(tokens.values()), -(-len(rows) // FIFTH)
    first, last = losses_by_language(plan, rows[:end]), losses_by_language(plan, rows[-end:])
    return [
        {
            "language": language,
            "planned_share": share[language],
            "share": tokens[language] / total,
            "off_by_samples": samples * (tokens[language] / total - share[language]),
            "tokens": tokens[language],
            "first_loss": first.get(language),
            "last_loss": last.get(language),
        }
        for language in dict.fromkeys(languages)
        if share[language] or tokens[language]
    ]


def tokens_by_language(plan: Plan, rows: Sequence[Row]) -> dict[str, int]:
    """Tokens of each language of the plan in some steps."""
    sums = dict.fromkeys((language_of(source) for source in plan.sources), 0)
    for source in plan.sources:
        sums[language_of(source)] += sum(row["tokens_by_source"].get(source.name, 0) for row in rows)
    return sums


def losses_by_language(plan: Plan, rows: Sequence[Row], groups: Mapping[str, str] | None = None) -> dict[str, float]:
    """Mean token losses over some steps of the languages that had a token, or of groups of languages."""
    sums: dict[str, list[float]] = {}
    for source in plan.sources:
        language = language_of(source)
        found = sums.setdefault(groups[language] if groups else language, [0.0, 0.0])
        for row in rows:
            tokens, loss = row["tokens_by_source"].get(source.name, 0), row["loss_by_source"].get(source.name)
            if tokens and loss is not None:
                found[0] += tokens * loss
                found[1] += tokens
    return {name: total / tokens for name, (total, tokens) in sums.items() if tokens}


def describe_shares(report: dict[str, Any]) -> str:
    """The report as tables to read."""
    lines = [
        f"{report['steps']:,} steps, {report['samples']:,} of {report['of_samples']:,} samples; {_exactness(report)}"
    ]
    for stage in report["stages"]:
        table = [["language", "planned", "realised", "off by samples", "tokens", "first loss", "last loss"]]
        for row in stage["languages"]:
            losses = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("first_loss", "last_loss")]
            shares = [f"{row['planned_share']:.3%}", f"{row['share']:.3%}", f"{row['off_by_samples']:+.2f}"]
            table.append([row["language"], *shares, f"{row['tokens']:,}", *losses])
        lines += ["", f"{stage['stage']}: {stage['samples']:,} samples in {stage['steps']:,} steps"]
        lines += [f"  {line}" for line in aligned(table, words=1)]
        planned, real = stage["planned_non_english_share"], stage["non_english_share"]
        lines.append(f"  non-English {real:.3%}, planned {planned:.3%}")
    return "\n".join([*lines, "", "losses are means over the first and the last fifth of a stage's steps"])


def _exactness(report: dict[str, Any]) -> str:
    off = report["steps_off_the_plan"]
    if off is None:
        return "labels are masked, so that tokens and samples are not compared step by step"
    said = f"{len(off)} of them not, first step {off[0]}" if off else "without exception"
    return f"each step has the tokens of each source that the plan gives it, {said}"
