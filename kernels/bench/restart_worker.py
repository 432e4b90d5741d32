"""What each rank of a restart benchmark runs: the training command itself, which notes when each part of a start ends.

`python restart_worker.py MARKS [flags of training]`; a line of MARKS is: restart, rank, process, seconds, part.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARKS = Path(sys.argv[1])


def mark(part: str) -> None:
    """Append a line; on one host all processes share this clock."""
    words = [os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], os.getpid(), time.monotonic(), part]
    with MARKS.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def marked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The same function; a mark when it returns."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        mark(part)
        return result

    return call


if __name__ == "__main__":
    mark("process")
    from megapoly.train import loop, main

    mark("imports")
    for module, name, part in (
        (main, "prepare", "plan and data"),
        (main, "init_mesh", "process groups"),
        (main, "build_run", "model"),
        (loop, "load_start", "load"),
        (loop, "train_step", "step"),
    ):
        setattr(module, name, marked(getattr(module, name), part))
    main.main("tiny", "tiny", Path("nowhere"), sys.argv[2:])
