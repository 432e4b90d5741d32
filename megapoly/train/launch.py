"""torchrun as `bash examples/..` starts it: ends with the status of its ranks, in silence where they have spoken."""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megapoly.errors import EXIT_STATUS, RESTART_STATUS, UNREAD_STATUS

SPOKEN = (EXIT_STATUS, RESTART_STATUS)  # a rank that ends with one of these has said why in a line


def main() -> None:
    """Run torchrun with the arguments given; a status of SPOKEN is passed on, any other ends in torchrun's own report.

    A signal, which torchrun has passed on and waited upon, ends in 128 plus its number, as in a shell; a reader that is
    gone (`| head`) as well, in silence.

    torchrun by itself ends with status 1 whatever its ranks end with, and with that report.
    """
    # What it logs of single ranks stands in the report as well.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        # torchrun ends the others by SIGTERM.
        statuses = {failure.exitcode for failure in error.failures.values()} - {-signal.SIGTERM}
        if UNREAD_STATUS in statuses:
            sys.exit(UNREAD_STATUS)
        if len(statuses) == 1 and statuses <= set(SPOKEN):
            sys.exit(statuses.pop())
        raise


if __name__ == "__main__":
    main()
