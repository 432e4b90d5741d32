"""All operations, each in a process of its own: python kernels/bench/run.py [--quick] [--only norm attention]

Writes results/<gpu-name>-<date>.json beside this file, or --json FILE, again and again as rows come: what was measured
survives if this is killed. A process that hangs or loses the GPU is started again and goes on without what did it.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import NO_GPU, add_limits, arguments, is_runnable
from results import Row, default_path, document_of, environment, read_rows, target_table, write_json

# The cheap ones first: the whole of --quick takes about six minutes, of which attention takes two.
OPERATIONS = ("rotary", "activation", "norm", "adamw", "cross_entropy", "linear_cross_entropy", "attention")
STARTS = 6  # of one script
LEAST = 5.0  # seconds that are worth a start


class Collected:
    """What the operations have told so far, and the file that holds it."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.told: dict[str, tuple[dict[str, Any], list[Row]]] = {}
        self._lock = threading.Lock()

    @property
    def rows(self) -> list[Row]:
        """The rows of all operations."""
        return [row for _, rows in self.told.values() for row in rows]

    def put(self, name: str, part: Path, failed: str | None) -> None:
        """Take over what a script has written by now, and write the whole."""
        told: dict[str, Any] = {}
        rows: list[Row] = []
        if part.exists():
            document = json.loads(part.read_text(encoding="utf-8"))
            told, rows = document["operations"][name], read_rows(document)
        if failed:
            rows.append(Row(name, "all", "all", "all", note=failed))
        with self._lock:
            self.told[name] = told | {"failed": failed}, rows
            if self.path is not None:
                write_json(self.path, document_of(self.head, self.operations, self.rows))

    @property
    def operations(self) -> dict[str, dict[str, Any]]:
        """Measured rates of each operation's process, and why it failed, if so."""
        return {name: told for name, (told, _) in self.told.items()}


def rows_in(part: Path) -> int:
    """How many rows a script has written, the unfinished ones included."""
    return len(json.loads(part.read_text(encoding="utf-8"))["rows"]) if part.exists() else 0


def run_one(name: str, folder: Path, collected: Collected, options: argparse.Namespace, deadline: float) -> None:
    """Run a script, again where it ended early but came further, and collect what it tells."""
    part, out, said = (folder / f"{name}.{suffix}" for suffix in ("json", "out", "err"))
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json", str(part), "--resume"]
    command += ["--limit", str(options.limit)] + ["--smoke"] * options.smoke + ["--quick"] * options.quick
    until = min(time.monotonic() + options.timeout, deadline)
    failed: str | None = "no time was left for it"
    for _ in range(STARTS):
        if until - time.monotonic() < LEAST:
            break
        before = rows_in(part)
        with out.open("a") as printed, said.open("w") as errors:
            process = subprocess.Popen(command, stdout=printed if options.smoke else None, stderr=errors)
            status = wait(process, until, lambda: collected.put(name, part, "was running"))
        failed = None if status == 0 else f"exit status {status}" if status is not None else "not finished in its time"
        complaint = said.read_text(encoding="utf-8", errors="replace").strip()
        if failed and complaint:
            print(complaint[-4000:], file=sys.stderr, flush=True)
            failed += f": {complaint.splitlines()[-1][:160]}"
        if not status or rows_in(part) <= before:
            break
    print(out.read_text(encoding="utf-8", errors="replace") if out.exists() else "", end="", flush=True)
    collected.put(name, part, failed)


def wait(process: subprocess.Popen[bytes], until: float, look: Callable[[], None]) -> int | None:
    """Exit status of a process, None where its time was over; calls `look` every few seconds."""
    status = None
    try:
        while status is None and time.monotonic() < until:
            try:
                status = process.wait(max(0.1, min(3.0, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                look()
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a GPU that hangs can keep its process from ending
            process.wait(10)
    return status


def main() -> int:
    """Measure, merge, print the targets, write; 1 where an operation failed as a whole."""
    parser = arguments("Times every operation beside its peers.")
    add_limits(parser)
    parser.add_argument("--only", nargs="+", default=list(OPERATIONS), choices=OPERATIONS, metavar="OPERATION")
    parser.add_argument("--timeout", type=float, help="seconds that one operation may take (1200; with --quick 180)")
    parser.add_argument("--total", type=float, help="seconds that all may take (no bound; with --quick 540)")
    options = parser.parse_args()
    if not is_runnable(options.smoke):
        return NO_GPU
    options.timeout = options.timeout or (180 if options.quick else 1200)
    deadline = time.monotonic() + (options.total or (540 if options.quick else 1e9))
    head = environment(options.smoke)
    path = options.json or (None if options.smoke else default_path(head["gpu"]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    collected = Collected(path, head)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:

        def one(name: str) -> None:
            run_one(name, Path(folder), collected, options, deadline)

        # What is measured runs alone, in this thread: a signal then ends the script that runs.
        list(ThreadPoolExecutor(2).map(one, options.only) if options.smoke else map(one, options.only))
    print(target_table(collected.rows))
    for name, told in collected.operations.items():
        if told["failed"]:
            print(f"{name}: FAILED, {told['failed']}")
    if path is not None:
        print(f"wrote {path}")
    return int(any(told["failed"] for told in collected.operations.values()))


if __name__ == "__main__":
    sys.exit(main())
