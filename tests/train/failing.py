"""A training command whose rank 2 fails in step 3 as the first argument says; the rest are flags."""

import os
import signal
import sys
from pathlib import Path

from megapoly.errors import DataError
from megapoly.train import loop
from megapoly.train.main import main
from megapoly.train.setup import Run
from megapoly.train.step import StepStats, train_step


def failing_step(run: Run, step: int) -> StepStats:
    if run.mesh.world.rank == 2 and step == 3:
        how = sys.argv[1]
        if how == "raise":
            raise ArithmeticError("the sum does not add up")
        if how == "refuse":
            raise DataError("a file of rank 2 is damaged")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
    return train_step(run, step)


if __name__ == "__main__":
    loop.train_step = failing_step
    main("tiny", "tiny", Path("nowhere"), sys.argv[2:])
