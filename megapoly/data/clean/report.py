"""What cleaning has done, as JSON, as a page with tables, as pictures, and samples of what was removed."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from megapoly.data.clean.ledger import Amount, Ledger, Tally
from megapoly.data.clean.pictures import draw
from megapoly.data.clean.steps import merged
from megapoly.data.clean.tables import page
from megapoly.errors import DataError
from megapoly.pictures import has_matplotlib


class WriteReport(PipelineStep):
    """The last stage: joins the ledgers of all tasks, writes the report, and removes what only stages needed."""

    type = "CLEAN"
    name = "report"

    def __init__(self, out: Path, ledgers: Sequence[Path], tasks: int, samples: int, stale: Sequence[Path]) -> None:
        super().__init__()
        self.out, self.ledgers, self.tasks, self.samples = out, list(ledgers), tasks, samples
        self.stale = list(stale)

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Write it; raises DataError where a task has left no ledger."""
        for folder in self.ledgers:
            if (found := len(list(folder.glob("*.json")))) != self.tasks:
                raise DataError(f"{folder}: {found} of {self.tasks} tasks have counted; run the same command again")
        ledger = merged(self.ledgers, self.samples)
        write_report(ledger, self.out)
        for folder in self.stale:
            shutil.rmtree(folder, ignore_errors=True)


def write_report(ledger: Ledger, out: Path) -> None:
    """Write report.json, report.md, removed/RULE.jsonl and, where matplotlib is, plots/*.png."""
    tree = report_of(ledger)
    samples = ledger.samples()
    (out / "report.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    folder = out / "removed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for rule, records in samples.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{_file_name(rule)}.jsonl").write_text(lines, encoding="utf-8")
    pictures = draw(tree, out / "plots") if has_matplotlib() and tree["languages"] else []
    (out / "report.md").write_text(page(tree, samples, pictures), encoding="utf-8")


def _file_name(rule: str) -> str:
    return re.sub(r"\W+", "-", rule)


def report_of(ledger: Ledger) -> dict[str, Any]:
    """All counts as plain data: of all languages and of each; amounts have documents and bytes."""
    total = Tally()
    for tally in ledger.languages.values():
        total.read.add(tally.read.documents, tally.read.bytes)
        total.kept.add(tally.kept.documents, tally.kept.bytes)
        for rule, amount in tally.removed.items():
            total.removed.setdefault(rule, Amount()).add(amount.documents, amount.bytes)
        total.mended.update(tally.mended)
        total.bad_lines.update(tally.bad_lines)
    return {
        "all": _tree(total),
        "languages": {name: _tree(ledger.languages[name]) for name in sorted(ledger.languages)},
    }


def _tree(tally: Tally) -> dict[str, Any]:
    return {
        "read": vars(tally.read),
        "kept": vars(tally.kept),
        "removed": {rule: vars(amount) for rule, amount in sorted(tally.removed.items())},
        "mended": dict(sorted(tally.mended.items())),
        "bad_lines": dict(sorted(tally.bad_lines.items())),
    }
