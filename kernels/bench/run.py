"""All operations, each in a process of its own: python kernels/bench/run.py [--only norm attention] [--json FILE]

Writes results/<gpu-name>-<date>.json beside this file. An operation whose process fails costs its own rows alone.
"""

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

from harness import NO_GPU, arguments, is_runnable
from results import Row, default_path, document_of, environment, read_rows, target_table, write_json

OPERATIONS = ("norm", "rotary", "attention", "activation", "cross_entropy", "linear_cross_entropy", "adamw")


def run_one(name: str, folder: Path, smoke: bool, timeout: float) -> tuple[dict[str, Any], list[Row]]:
    """Run a script; its measured rates and rows, or why there are none."""
    file = folder / f"{name}.json"
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json", str(file)]
    command += ["--smoke"] if smoke else []
    errors = folder / f"{name}.err"
    try:
        with errors.open("w") as stream:
            done = subprocess.run(command, stdout=PIPE if smoke else None, stderr=stream, timeout=timeout, check=False)
        status, reason = done.returncode, f"exit status {done.returncode}"
        print((done.stdout or b"").decode(), end="", flush=True)
    except subprocess.TimeoutExpired:
        status, reason = 1, f"not finished after {timeout:g} s"
    said = errors.read_text(encoding="utf-8", errors="replace").strip()
    if status == 0 and file.exists():
        document = json.loads(file.read_text(encoding="utf-8"))
        return document["operations"][name], read_rows(document)
    if said:
        print(said, file=sys.stderr)
        reason += f": {said.splitlines()[-1][:160]}"
    return {"failed": reason}, [Row(name, "all", "all", "all", note=reason)]


def main() -> int:
    """Measure, merge, print the targets, write; 1 where an operation failed as a whole."""
    parser = arguments("Times every operation beside its peers.")
    parser.add_argument("--only", nargs="+", default=list(OPERATIONS), choices=OPERATIONS, metavar="OPERATION")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one operation may take")
    options = parser.parse_args()
    if not is_runnable(options.smoke):
        return NO_GPU
    head = environment(options.smoke)
    operations: dict[str, Any] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        workers = ThreadPoolExecutor(2 if options.smoke else 1)  # what is measured runs alone
        one = partial(run_one, folder=Path(folder), smoke=options.smoke, timeout=options.timeout)
        for name, (told, some) in zip(options.only, workers.map(one, options.only), strict=True):
            operations[name] = told
            rows += some
    print(target_table(rows))
    for name, told in operations.items():
        if told["failed"]:
            print(f"{name}: FAILED, {told['failed']}")
    path = options.json or (None if options.smoke else default_path(head["gpu"]))
    if path is not None:
        write_json(path, document_of(head, operations, rows))
        print(f"wrote {path}")
    return int(any(told["failed"] for told in operations.values()))


if __name__ == "__main__":
    sys.exit(main())
