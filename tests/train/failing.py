"""A training command in which a rank (2 of 4, 1 of 2) meets in step 3 what the first argument says; the rest are flags.

WIDE in the environment opens so many files first, as a corpus in many files does.
"""

import os
import signal
import sys
import time
from pathlib import Path

from megapoly.checkpoint import save
from megapoly.errors import DataError
from megapoly.train import loop
from megapoly.train.main import main
from megapoly.train.setup import Run
from megapoly.train.step import StepStats, train_step


def failing_step(run: Run, step: int) -> StepStats:
    if run.mesh.world.rank == run.mesh.world.size // 2 and step == 3:
        how = sys.argv[1]
        if how == "raise":
            raise ArithmeticError("the sum does not add up")
        if how == "refuse":
            raise DataError("a file of rank 2 is damaged")
        if how == "hang":
            time.sleep(3600)
        if how not in ("go", "stuck"):
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(how) or signal.Signals[how])
    return train_step(run, step)


if __name__ == "__main__":
    loop.train_step = failing_step
    files = [os.dup(0) for _ in range(int(os.environ.get("WIDE", 0)))]
    if sys.argv[1] == "stuck" and os.environ["RANK"] == "2":
        save.write_shard = lambda *_: time.sleep(3600)  # a file server that is gone
    main("tiny", "tiny", Path("nowhere"), sys.argv[2:])
