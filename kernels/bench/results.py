"""Rows of a measurement: ratios, targets, the printed table and the JSON file."""

import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """What our kernel has to reach: `quantity` is a field of Row, ms and extra_gb at most, the others at least.

    `gpu`: the target holds on GPUs whose name contains this; shares of the measured copy rate hold on all.
    """

    quantity: str
    must: float
    reach: float | None = None
    gpu: str = ""

    def says(self, unit: str) -> str:
        """As a person reads it, e.g. `>= 3.7 TB/s on H200`."""
        sign = "<=" if self.is_ceiling else ">="
        named = {"rate": f" {unit}", "percent": "% of copy", "ms": " ms", "extra_gb": " GB extra"}[self.quantity]
        reach = f", reach {self.reach:g}" if self.reach is not None else ""
        return f"{sign} {self.must:g}{named}{reach}{f' on {self.gpu}' if self.gpu else ''}"

    @property
    def is_ceiling(self) -> bool:
        """Whether less is better."""
        return self.quantity in ("ms", "extra_gb")

    def is_met(self, value: float, bound: float) -> bool:
        """Whether a measured value keeps a bound of this target."""
        return value <= bound if self.is_ceiling else value >= bound


@dataclass
class Row:
    """One implementation in one direction at one shape; None where it did not run, `note` says why.

    `percent` is the share of the measured rate `percent_of` (copy or gemm), `ratio` the best peer's time over this
    one's (above 1: faster than every peer), `error` the largest difference from an fp32 reference over its largest
    entry. `backend` is megapoly's name of the implementation, empty for peers; `record` its key in measured.json.
    """

    operation: str
    shape: str
    direction: str
    implementation: str
    backend: str = ""
    record: str = ""
    ms: float | None = None
    rate: float | None = None
    unit: str = ""
    percent: float | None = None
    percent_of: str = ""
    ratio: float | None = None
    error: float | None = None
    is_wrong: bool = False
    extra_gb: float | None = None
    timer: str = ""
    targets: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""

    def judge(self, targets: Sequence[Target], gpu: str, smoke: bool) -> None:
        """Hold the row against its targets; what holds on another GPU, or was not measured, is neither met nor not."""
        for target in targets:
            value = getattr(self, target.quantity)
            counts = value is not None and not smoke and target.gpu in gpu
            wrong = self.is_wrong  # a fast wrong kernel meets nothing
            met = target.is_met(value, target.must) and not wrong if counts else None
            reached = None
            if counts and target.reach is not None:
                reached = target.is_met(value, target.reach) and not wrong
            self.targets.append({"target": target.says(self.unit), "met": met, "reached": reached})


def add_ratios(rows: Sequence[Row]) -> None:
    """Fill `ratio` from the fastest peer of the same operation, shape and direction; wrong results do not count."""
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.ms is not None and not row.backend and not row.is_wrong:
            key = (row.operation, row.shape, row.direction)
            best[key] = min(best.get(key, row.ms), row.ms)
    for row in rows:
        peer = best.get((row.operation, row.shape, row.direction))
        if row.ms and peer is not None:
            row.ratio = peer / row.ms


class LeftOut(Exception):
    """An implementation that is not measured on purpose; the reason becomes its row's note."""


def first_line(error: BaseException) -> str:
    """An exception as a note of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}".rstrip(": ")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a block for each operation, shape and direction."""
    lines: list[str] = []
    seen: tuple[str, str, str] | None = None
    for row in rows:
        key = (row.operation, row.shape, row.direction)
        if key != seen:
            seen = key
            lines += ["", f"{row.operation}  {row.shape}  {row.direction}"]
            lines.append(
                f"  {'implementation':<34}{'ms':>10}{'rate':>9} {'unit':<8}{'%':>6} {'of':<5}{'ratio':>7}{'error':>9}"
                f"{'extra GB':>10}  {'timer':<7}"
            )
        judged = "; ".join(
            f"{t['target']}: {'not judged' if t['met'] is None else 'MET' if t['met'] else 'NOT MET'}"
            f"{'' if t['reached'] is None else ', reached' if t['reached'] else ', not reached'}"
            for t in row.targets
        )
        remarks = " | ".join(text for text in ("WRONG" if row.is_wrong else "", judged, row.note) if text)
        lines.append(
            f"  {row.implementation:<34}{_number(row.ms, '.4f'):>10}{_number(row.rate, '.3g'):>9} {row.unit:<8}"
            f"{_number(row.percent, '.1f'):>6} {row.percent_of:<5}{_number(row.ratio, '.2f'):>7}"
            f"{_number(row.error, '.1e'):>9}{_number(row.extra_gb, '.2f'):>10}  {row.timer:<7}  {remarks}".rstrip()
        )
    return "\n".join(lines)


def target_table(rows: Sequence[Row]) -> str:
    """One line a target: met, not met, or not judged on this GPU."""
    lines = ["", "targets"]
    for row in rows:
        for t in row.targets:
            verdict = "not judged" if t["met"] is None else "met" if t["met"] else "NOT MET"
            if t["reached"] is not None:
                verdict += ", reached" if t["reached"] else ", not reached"
            name = f"{row.operation} {row.shape} {row.direction}"
            lines.append(f"  {name:<72}{t['target']:<48}{verdict}")
    return "\n".join(lines) if len(lines) > 2 else ""


def environment(smoke: bool) -> dict[str, Any]:
    """The machine and the software that rows were measured on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = torch.cuda.is_available() and not smoke
    return {
        "format": 1,
        "smoke": smoke,
        "gpu": torch.cuda.get_device_name() if on_gpu else f"no GPU ({platform.machine()})",
        **(_nvidia_smi() if on_gpu else {"driver": None, "clocks": None}),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _nvidia_smi() -> dict[str, Any]:
    """Driver, clocks and power limits of all GPUs of the host, where nvidia-smi tells."""
    wanted = "driver_version,name,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"driver": None, "clocks": None}
    command = [tool, f"--query-gpu={wanted}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {"driver": None, "clocks": None}
    cells = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.strip()]
    names = wanted.split(",")[1:]
    return {
        "driver": cells[0][0] if cells else None,
        "clocks": [dict(zip(names, line[1:], strict=False)) for line in cells] or None,
    }


def default_path(gpu: str, suffix: str = "") -> Path:
    """results/<gpu-name>-<date><suffix>.json beside this file."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    return FOLDER / f"{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}{suffix}.json"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a result; a smoke run's never lies among the results. Raises ValueError where it would."""
    if document["smoke"] and path.resolve().is_relative_to(FOLDER.resolve()):
        raise ValueError(f"{path}: a smoke run measures nothing and is not kept among the results")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)  # whoever reads, or is killed, finds a whole file


def document_of(head: dict[str, Any], operations: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What a results file of operations holds."""
    return {**head, "operations": operations, "rows": [asdict(row) for row in rows]}


def read_rows(document: dict[str, Any]) -> list[Row]:
    """The rows of a results file."""
    return [Row(**row) for row in document["rows"]]
