"""The report as tables: for a terminal, and as a page of Markdown."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OF_DUPLICATES = ("exact duplicate", "near duplicate")
SAMPLE_LINE = 120


def table(tree: dict[str, Any]) -> list[str]:
    """Lines for a terminal: documents and MB read, shares removed by rules and as duplicates, what stays, bad lines."""
    head = f"{'language':<10}{'documents':>11}{'MB':>10}{'by rules':>10}{'duplicates':>12}{'kept':>11}{'MB kept':>10}"
    lines = [head]
    read = {name: part for name, part in tree["languages"].items() if part["read"]["documents"]}
    for name, part in [*read.items(), ("all", tree["all"])]:
        rules, duplicates = shares(part)
        lines.append(
            f"{name:<10}{part['read']['documents']:>11,}{part['read']['bytes'] / 1e6:>10.2f}{rules:>10.1%}"
            f"{duplicates:>12.1%}{part['kept']['documents']:>11,}{part['kept']['bytes'] / 1e6:>10.2f}"
        )
    if bad := tree["all"]["bad_lines"]:
        kinds = ", ".join(f"{kind}: {count:,}" for kind, count in bad.items())
        lines.append(f"{sum(bad.values()):,} bad lines left out ({kinds})")
    return lines


def shares(part: dict[str, Any]) -> tuple[float, float]:
    """Which share of the documents read the rules removed, and which share of the rest was duplicates."""
    documents = {rule: amount["documents"] for rule, amount in part["removed"].items()}
    duplicates = sum(documents.pop(rule, 0) for rule in OF_DUPLICATES)
    by_rules = sum(documents.values())
    return by_rules / max(1, part["read"]["documents"]), duplicates / max(1, part["read"]["documents"] - by_rules)


def page(tree: dict[str, Any], samples: dict[str, list[dict[str, Any]]], pictures: Sequence[Path]) -> str:
    """The report as Markdown."""
    languages = tree["languages"]
    parts = ["# Cleaning", "", "`by rules` is a share of all documents, `duplicates` of those that the rules left.", ""]
    parts += ["```text", *table(tree), "```", ""]
    parts += [f"![{path.stem}]({path.parent.name}/{path.name})\n" for path in pictures]
    removed = {name: {rule: a["documents"] for rule, a in part["removed"].items()} for name, part in languages.items()}
    parts += ["## Documents removed, by rule and language", "", *_matrix(removed, tree["all"]["removed"])]
    mended = {name: part["mended"] for name, part in languages.items()}
    parts += ["## Documents mended, by what and language", "", *_matrix(mended, tree["all"]["mended"])]
    if tree["all"]["bad_lines"]:
        bad = {name: part["bad_lines"] for name, part in languages.items()}
        parts += ["## Lines that are no document", "", *_matrix(bad, tree["all"]["bad_lines"])]
    parts += ["## Samples of what was removed", "", "More of them, and longer: `removed/`.", ""]
    for rule, records in samples.items():
        parts.append(f"**{rule}**\n")
        for record in records[:: max(1, len(records) // 3)][:3]:
            text = " ".join(record["text"].split())[:SAMPLE_LINE].replace("`", "'")
            parts.append(f"- {record['lang']} ({record['detail'] or 'of another document'}): `{text}`")
        parts.append("")
    return "\n".join(parts)


def _matrix(rows: dict[str, dict[str, int]], columns: dict[str, Any]) -> list[str]:
    """A table of languages by names; the most frequent name first."""
    total: Counter[str] = Counter()
    for row in rows.values():
        total.update(row)
    names = sorted(columns, key=lambda name: -total[name])
    if not names:
        return ["None.", ""]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for language, row in [*rows.items(), ("all", total)]:
        lines.append(
            f"| {language} | " + " | ".join(f"{row.get(name, 0):,}" if row.get(name) else "" for name in names) + " |"
        )
    return [*lines, ""]
