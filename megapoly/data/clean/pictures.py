"""Pictures of the report: what became of each language's documents, and which rules removed how much of each."""

from pathlib import Path
from typing import Any

from megapoly.pictures import save_png

# Rules in groups, in the order in which they are met; what is not named here is quality.
GROUPS = {
    "language": ("language not wanted", "language uncertain", "other language", "script"),
    "repetition": ("repeated lines", "repeated paragraphs", "one n-gram", "repeated n-grams"),
    "exact duplicate": ("exact duplicate",),
    "near duplicate": ("near duplicate",),
}
COLOURS = {
    "kept": "#59a14f",
    "language": "#b07aa1",
    "quality": "#edc948",
    "repetition": "#f28e2b",
    "exact duplicate": "#9c755f",
    "near duplicate": "#4e79a7",
}


def group_of(rule: str) -> str:
    """The group that a rule belongs to."""
    return next((group for group, rules in GROUPS.items() if rule in rules), "quality")


def draw(tree: dict[str, Any], folder: Path) -> list[Path]:
    """Write kept.png and rules.png into a folder; returns their paths."""
    folder.mkdir(exist_ok=True)
    read = {name: part for name, part in tree["languages"].items() if part["read"]["documents"]}
    if not read:
        return []
    return [_draw_kept(read, folder / "kept.png"), _draw_rules(read, folder / "rules.png")]


def _draw_kept(read: dict[str, Any], path: Path) -> Path:
    from matplotlib.figure import Figure

    names = sorted(read, reverse=True)
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for group, colour in COLOURS.items():
        widths = [100 * _documents(read[name], group) / read[name]["read"]["documents"] for name in names]
        axes.barh(names, widths, left=left, color=colour, label=group)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, name in enumerate(names):
        kept = 100 * read[name]["kept"]["documents"] / read[name]["read"]["documents"]
        axes.text(101, row, f"{kept:.1f}% of {read[name]['read']['documents']:,}", va="center", fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("% of documents; to the right, what is kept")
    axes.set_title("What became of the documents")
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False, fontsize=8)
    save_png(figure, str(path), 120)
    return path


def _documents(part: dict[str, Any], group: str) -> int:
    if group == "kept":
        return int(part["kept"]["documents"])
    return sum(amount["documents"] for rule, amount in part["removed"].items() if group_of(rule) == group)


def _draw_rules(read: dict[str, Any], path: Path) -> Path:
    from matplotlib.figure import Figure

    rules = sorted({rule for part in read.values() for rule in part["removed"]}, key=lambda r: (group_of(r), r))
    names = sorted(read)
    shares = [
        [100 * read[name]["removed"].get(rule, {"documents": 0})["documents"] / read[name]["read"]["documents"]
         for rule in rules]
        for name in names
    ]  # fmt: skip
    figure = Figure(figsize=(3 + 0.62 * max(1, len(rules)), 2.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_title("% of documents removed, by rule")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(rules)), rules, rotation=40, ha="right", rotation_mode="anchor")
    if rules:
        most = max(max(row) for row in shares) or 1.0
        axes.imshow(shares, cmap="YlOrBr", vmin=0, vmax=most, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share:
                    colour = "white" if share > 0.6 * most else "black"
                    axes.text(x, y, f"{share:.1f}", ha="center", va="center", fontsize=7, color=colour)
    save_png(figure, str(path), 120)
    return path
