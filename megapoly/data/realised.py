"""What a run has read, by its own metrics.jsonl, beside its plan: shares and losses by stage and language."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megapoly.data.curriculum import Plan, united
from megapoly.data.plan_report import aligned
from megapoly.data.sources import language_of
from megapoly.errors import DataError

FIFTH = 5  # the first and the last loss of a stage are means over this part of its steps
MOST = 1 << 60
Row = dict[str, Any]
TIMES = re.compile("seconds|tokens_per_second|tflops_per_device|mfu|(probe|loading)_.*")
KEYS = {"step": int, "samples": int, "tokens_by_source": dict, "loss_by_source": dict}


@dataclass(frozen=True)
class Steps:
    """R steps of a run over the S sources of its plan, the first of which is step number `first`.

    `ends` are the samples before the first step and after each, R + 1 numbers; a loss is NaN where there is none.
    Nothing was read in a step that a rollback left out.
    """

    first: int
    ends: npt.NDArray[np.int64]
    tokens_RS: npt.NDArray[np.int64]
    losses_RS: npt.NDArray[np.float64]
    is_read_R: npt.NDArray[np.bool_]

    @property
    def num(self) -> int:
        return len(self.tokens_RS)

    def of_stages(self, plan: Plan) -> list[int]:
        """The row of each stage's first step, whose first sample is in the stage, and the number of rows."""
        borders = [stage.begin_sample for stage in plan.stages[1:]]
        return [0, *np.searchsorted(self.ends[:-1], borders).tolist(), self.num]


def without_times(row: Row) -> Row:
    """A row of metrics.jsonl without what the clock decides: all else is the same whenever the run is repeated."""
    return {key: value for key, value in row.items() if not TIMES.fullmatch(key)}


def config_of(run: str) -> str:
    """The configuration of a run, by its folder."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise DataError(f"--run {run}: has no config.yaml; give the folder of a run that has begun")
    return str(path)


def read_steps(path: Path, plan: Plan) -> Steps:
    """The steps of metrics.jsonl; DataError names the line that is none of this plan's run."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a row that is being written is left out
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise DataError(f"{path}: cannot be read ({reason}); give the folder of a run that has begun") from None
    if not lines:
        raise DataError(f"{path}: holds no step; give the folder of a run that has begun")
    return _steps(path, lines, plan)


def _steps(path: Path, lines: Sequence[str], plan: Plan) -> Steps:
    column = {source.name: i for i, source in enumerate(plan.sources)}
    tokens_RS = np.zeros((len(lines), len(column)), np.int64)
    losses_RS = np.full(tokens_RS.shape, np.nan)
    is_read_R = np.ones(len(lines), np.bool_)
    first, ends = 1, [0]
    for number, line in enumerate(lines):
        where = f"{path}, line {number + 1}"
        row = _row(line, where)
        if number == 0:
            first = max(row["step"], 1)
        if not row["step"] == first + number < MOST or not ends[-1] < row["samples"] <= plan.num_samples:
            raise DataError(
                f"{where}: step {row['step']} to sample {row['samples']} does not follow; the file was altered: "
                "take it from a copy, or cut it before this line"
            )
        ends.append(row["samples"])
        is_read_R[number] = row.get("left_out") is not True
        for cells, key in ((tokens_RS, "tokens_by_source"), (losses_RS, "loss_by_source")):
            for name, value in row[key].items():
                if name not in column:
                    raise DataError(f"{where}: source '{name[:60]}' is not in the plan")
                cells[number, column[name]] = value
    if first > 1:  # it went on from a checkpoint elsewhere
        ends[0] = ends[1] - -(-int(tokens_RS[0].sum()) // plan.block_length)
        if (_is_packed(plan) or not is_read_R[0]) and len(lines) > 1:  # of how many samples these are cannot be told
            return Steps(first + 1, np.array(ends[1:]), tokens_RS[1:], losses_RS[1:], is_read_R[1:])
    return Steps(first, np.array(ends), tokens_RS, losses_RS, is_read_R)


def _row(line: str, where: str) -> Row:
    """A row with all of KEYS and numbers in them; a loss that was not finite is NaN, one left out none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and row.get("left_out") is True:
        row |= {"tokens_by_source": {}, "loss_by_source": {}}
    if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in KEYS.items()):
        raise DataError(f"{where}: no step of a run; a resume of the run drops torn lines")
    row["loss_by_source"] = {name: math.nan if x is None else x for name, x in row["loss_by_source"].items()}
    for key, kinds in (("tokens_by_source", int), ("loss_by_source", (int, float))):
        for name, value in row[key].items():
            if not isinstance(value, kinds) or value < 0 or value > MOST:
                raise DataError(f"{where}: {key} of '{name}' is {str(value)[:40]}, no number of a run")
    return row


def share_report(plan: Plan, steps: Steps, has_masked_labels: bool = False) -> dict[str, Any]:
    """Planned and realised shares, tokens and losses by language of each stage that has begun, as plain data.

    A step counts in the stage of its first sample, its plan is that of its own samples. `off_by_samples` is what was
    read beyond the plan; `steps_off_the_plan` are those whose tokens of some source are not those of the sampler's
    samples, None where that cannot be told: masked labels are not counted, and rows of packed text differ in theirs.
    What a rollback left out is in no number but `left_out_samples` and `steps_left_out`.
    """
    borders, reports = steps.of_stages(plan), []
    for stage, first, last in zip(plan.stages, borders, borders[1:], strict=False):
        if first == last:
            continue
        of_steps_R = np.diff(steps.ends[first : last + 1])
        samples = int(of_steps_R[steps.is_read_R[first:last]].sum())
        planned, read = planned_shares(plan, steps, first, last), steps.tokens_RS[first:last].sum(0).tolist()
        reports.append(
            {
                "stage": stage.name,
                "samples": samples,
                "steps": int(steps.is_read_R[first:last].sum()),
                "left_out_samples": int(of_steps_R.sum()) - samples,
                "planned_non_english_share": plan.non_english_share(planned),
                "non_english_share": plan.non_english_share(read),
                "languages": _language_rows(plan, steps, first, last, planned, samples),
            }
        )
    return {
        "first_step": steps.first,
        "steps": steps.num,
        "samples": int(steps.ends[-1]),
        "of_samples": plan.num_samples,
        "steps_left_out": (steps.first + np.flatnonzero(~steps.is_read_R)).tolist(),
        "steps_off_the_plan": None if has_masked_labels or _is_packed(plan) else _steps_off(plan, steps),
        "stages": reports,
    }


def planned_shares(plan: Plan, steps: Steps, first: int, last: int) -> list[float]:
    """The share of each source that the samples which steps first to last have read should have; zeros for none."""
    own_R = zip(steps.ends[first:last].tolist(), steps.ends[first + 1 : last + 1].tolist(), strict=True)
    spans = united(span for span, is_read in zip(own_R, steps.is_read_R[first:last], strict=True) if is_read)
    total = sum(end - begin for begin, end in spans)
    sums = [0.0] * len(plan.sources)
    for begin, end in spans:
        shares = plan.planned_shares(begin, end)
        sums = [sum_ + share * ((end - begin) / total) for sum_, share in zip(sums, shares, strict=True)]
    return sums


def _is_packed(plan: Plan) -> bool:
    return any(source.packed for source in plan.sources)


def _steps_off(plan: Plan, steps: Steps) -> list[int]:
    counts = np.array([plan.sampler().counts(end) for end in steps.ends.tolist()])
    is_off = (np.diff(counts, axis=0) * plan.block_length != steps.tokens_RS).any(axis=1) & steps.is_read_R
    return (steps.first + np.flatnonzero(is_off)).tolist()


def _language_rows(
    plan: Plan, steps: Steps, first: int, last: int, planned: Sequence[float], samples: int
) -> list[dict[str, Any]]:
    share, tokens = by_language(plan, planned), by_language(plan, steps.tokens_RS[first:last].sum(0).tolist())
    total = max(sum(tokens.values()), 1)
    read = [first + int(row) for row in np.flatnonzero(steps.is_read_R[first:last])] or [first]
    part = -(-len(read) // FIFTH)
    at_first, at_last = (losses_by_language(plan, steps, rows[0], rows[-1] + 1) for rows in (read[:part], read[-part:]))
    return [
        {
            "language": language,
            "planned_share": share[language],
            "share": tokens[language] / total,
            "off_by_samples": samples * (tokens[language] / total - share[language]),
            "tokens": tokens[language],
            "first_loss": at_first.get(language),
            "last_loss": at_last.get(language),
        }
        for language in share
        if share[language] or tokens[language]
    ]


def by_language(plan: Plan, values: Iterable[Any]) -> dict[str, Any]:
    """Sums by language, code as its own, of values by source."""
    sums: dict[str, Any] = {}
    for source, value in zip(plan.sources, values, strict=True):
        sums[language_of(source)] = sums.get(language_of(source), 0) + value
    return sums


def losses_by_language(
    plan: Plan, steps: Steps, first: int, last: int, groups: Mapping[str, str] | None = None
) -> dict[str, float]:  # fmt: skip
    """Mean token losses over steps first to last of the languages that had a token, or of groups of languages."""
    tokens_RS, losses_RS = steps.tokens_RS[first:last], steps.losses_RS[first:last]
    tokens_RS = np.where(np.isnan(losses_RS), 0, tokens_RS)
    totals = by_language(plan, (tokens_RS * np.nan_to_num(losses_RS)).sum(0).tolist())
    counts = by_language(plan, tokens_RS.sum(0).tolist())
    sums: dict[str, list[float]] = {}
    for language, count in counts.items():
        found = sums.setdefault(groups[language] if groups else language, [0.0, 0.0])
        found[0] += totals[language]
        found[1] += count
    return {name: total / count for name, (total, count) in sums.items() if count}


def describe_shares(report: dict[str, Any]) -> str:
    """The report as tables to read."""
    since = f" from step {report['first_step']:,} on" if report["first_step"] > 1 else ""
    size = f"{report['steps']:,} steps{since}, to sample {report['samples']:,} of {report['of_samples']:,}"
    lines = [f"{size}; {_exactness(report)}"]
    if gone := report["steps_left_out"]:
        lines.append(f"{len(gone):,} of them, from step {gone[0]:,} to {gone[-1]:,}, were left out after a spike")
    for stage in report["stages"]:
        table = [["language", "planned", "realised", "off by samples", "tokens", "first loss", "last loss"]]
        for row in stage["languages"]:
            losses = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("first_loss", "last_loss")]
            shares = [f"{row['planned_share']:.3%}", f"{row['share']:.3%}", f"{row['off_by_samples']:+.2f}"]
            table.append([row["language"], *shares, f"{row['tokens']:,}", *losses])
        gap = f", {stage['left_out_samples']:,} more left out" if stage["left_out_samples"] else ""
        lines += ["", f"{stage['stage']}: {stage['samples']:,} samples in {stage['steps']:,} steps{gap}"]
        lines += [f"  {line}" for line in aligned(table, words=1)]
        planned, real = stage["planned_non_english_share"], stage["non_english_share"]
        lines.append(f"  non-English {real:.3%}, planned {planned:.3%}")
    return "\n".join([*lines, "", "losses are means over the first and the last fifth of a stage's steps"])


def _exactness(report: dict[str, Any]) -> str:
    off = report["steps_off_the_plan"]
    if off is None:
        return "labels are masked or text is packed, so that tokens and samples are not compared step by step"
    said = f"{len(off)} of them not, first step {off[0]}" if off else "without exception"
    return f"each step has the tokens of each source that the plan gives it, {said}"
