"""Write the winners of a results file into measured.json: python kernels/bench/record.py [FILE]

For each choice (attention, norm, activation, loss, adamw) the implementation of megapoly's that is fastest over all
its measured shapes, forward and backward together (geometric mean), if it is right and ran on every one of them.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import NO_GPU
from megapoly_kernels.backends import CHOICES
from results import FOLDER, Row, read_rows

MEASURED = Path(__file__).parent.parent / "megapoly_kernels" / "measured.json"
OPTIONAL = ("flash_attn", "apex")  # packages that another host with the same GPU may not have


def seconds(rows: Sequence[Row]) -> dict[str, dict[tuple[str, str], float]]:
    """Milliseconds of forward and backward together by (operation, shape), by backend; failed shapes are left out."""
    parts: dict[str, dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        if row.backend:
            parts.setdefault(row.backend, {}).setdefault((row.operation, row.shape), {})[row.direction] = row
    taken: dict[str, dict[tuple[str, str], float]] = {}
    for backend, cases in parts.items():
        for case, directions in cases.items():
            counted = [d for d in ("step", "both") if d in directions] or ["forward", "backward"]
            some = [directions.get(d) for d in counted]
            if all(row is not None and row.ms and not row.is_wrong for row in some):
                taken.setdefault(backend, {})[case] = sum(row.ms for row in some if row and row.ms)
    return taken


def winners(rows: Sequence[Row]) -> tuple[dict[str, str], list[str]]:
    """The winner of each choice, and what a person should know about it."""
    chosen: dict[str, str] = {}
    remarks: list[str] = []
    for choice, allowed in CHOICES.items():
        some = [row for row in rows if row.record == choice]
        shapes = {(row.operation, row.shape) for row in some if row.backend}
        whole = {
            backend: math.exp(sum(math.log(ms) for ms in taken.values()) / len(taken))
            for backend, taken in seconds(some).items()
            if backend in allowed and taken.keys() == shapes
        }
        ranked = sorted(whole, key=lambda backend: whole[backend])
        ours = [backend for backend in ranked if backend not in OPTIONAL]
        if not ours:
            remarks.append(f"{choice}: no implementation ran at every shape; left as it is")
            continue
        chosen[choice] = ours[0]
        for backend in ranked[: ranked.index(ours[0])]:
            gain = whole[ours[0]] / whole[backend]
            remarks.append(f"{choice}: {backend} is {gain:.2f} times as fast, and taken by name only: it is a package")
    return chosen, remarks


def refusal(document: dict[str, Any]) -> str | None:
    """Why a file cannot be recorded from, if so."""
    if document.get("format") != 1 or "rows" not in document:
        return "is no result of make bench"
    if document["smoke"]:
        return "is a smoke run, which measures nothing"
    if "no GPU" in document["gpu"] or (not document["driver"] and document["cuda"] is None):
        return "was not measured on a GPU"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Record; 2 where there is nothing to record from."""
    parser = argparse.ArgumentParser(description="Records the fastest implementations of a GPU.")
    parser.add_argument("file", type=Path, nargs="?", help="a results file (default: the newest in results/)")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="the table that is written")
    options = parser.parse_args(arguments)
    files = sorted(FOLDER.glob("*.json"), key=lambda path: path.stat().st_mtime)
    files = [path for path in files if not path.stem.endswith("-step")]
    file = options.file or (files[-1] if files else None)
    if file is None:
        print(f"record.py: no results in {FOLDER}; make bench writes them")
        return NO_GPU
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"record.py: {file} cannot be read: {error}")
        return NO_GPU
    reason = refusal(document)
    if reason is not None:
        print(f"record.py: {file} {reason}")
        return NO_GPU
    gpu = document["gpu"]
    chosen, remarks = winners(read_rows(document))
    table = json.loads(options.measured.read_text(encoding="utf-8"))
    before = table.get(gpu, {})
    for choice, backend in chosen.items():
        was = before.get(choice, "not measured")
        print(f"{gpu}: {choice} {backend}" + ("" if was == backend else f" (was: {was})"))
    failed = {name: told["failed"] for name, told in document["operations"].items() if told.get("failed")}
    remarks += [f"{name} was measured in part: {reason}" for name, reason in failed.items()]
    for remark in remarks:
        print(remark)
    table[gpu] = before | chosen
    options.measured.write_text(json.dumps(dict(sorted(table.items())), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.measured}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
