"""The mistakes of a user, and how a program ends on one: a single line that names the file, the value and the fix."""

import contextlib
import functools
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

EXIT_STATUS = 2
FAILURE_STATUS = 1
RESTART_STATUS = 75  # EX_TEMPFAIL of sysexits.h: saved when asked to stop; the same command goes on
UNREAD_STATUS = 128 + signal.SIGPIPE  # nobody reads what is printed, as a shell says it
SPEAKER_SECONDS = 20.0


class MegapolyError(Exception):
    """Bad input; the message is one line that says what is wrong, where, and what to do."""

    status = EXIT_STATUS


class ConfigError(MegapolyError):
    """A configuration key, value or flag that cannot be used."""


class DataError(MegapolyError):
    """A dataset, corpus or JSONL file that is missing, damaged or does not fit."""


class TokenizerError(MegapolyError):
    """A tokenizer file that is missing, damaged or of another type than asked for."""


class CheckpointError(MegapolyError):
    """A checkpoint that is missing, damaged or of another model."""


class DamageError(CheckpointError):
    """A checkpoint whose bytes are not what was written: a file is missing, cut off or has another checksum."""


class StuckError(MegapolyError):
    """Storage that does not answer: nobody's mistake, and the same command started again may go on."""

    status = FAILURE_STATUS


class ReplicaError(MegapolyError):
    """Weights that should be equal on several ranks and are not."""


class TroubleError(MegapolyError):
    """Numbers of a run that are beyond what it can go on with."""


class Echo(MegapolyError):
    """What another rank has found as well and says; this one ends silently, with the same status."""

    def __init__(self, text: str, status: int = EXIT_STATUS) -> None:
        super().__init__(text)
        self.status = status


def _let_the_speaker_finish(status: int) -> None:
    """Wait until the launcher ends this process: it would end the one that speaks as soon as any other is gone."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
    time.sleep(SPEAKER_SECONDS)


def _flush(is_logged: bool) -> None:
    """Print what is left to print; where its reader has gone (`| head`), end silently, as other commands do.

    What a log does not take, of a full disk, is thrown away: at the exit of Python it would change the status.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if stream is sys.stdout and isinstance(error, BrokenPipeError):
                os._exit(UNREAD_STATUS)
            if not is_logged:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_now(status: int) -> NoReturn:
    """End with all that was printed but without Python's own way out, on which threads of torch's C++ may abort.

    They then wake in an interpreter that is gone, and the status is that of an abort, though all was done.
    """
    _flush(is_logged=True)
    os._exit(status)


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # a log that cannot be written must not change the status
        print(line, file=sys.stderr, flush=True)


def is_read() -> bool:
    """Whether somebody still reads stdout, where that is a pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def exit_on_error(
    main: Callable[..., None], speaks: Callable[[], bool] = lambda: True, is_logged: bool = False
) -> Callable[..., None]:
    """Wrap an entry point: a MegapolyError ends in one line on stderr and its status, 2 mostly, without a traceback.

    `speaks` tells, when an error comes, whether this process prints it: what all siblings find alike, one of them says,
    and an Echo nobody. Where nobody reads stdout any more (`| head`) it ends in silence. With `is_logged`, lines that a
    full disk does not take cost nothing but themselves. Ctrl-C ends it with the word "interrupted" and by SIGINT
    itself, on which a shell's loop stops.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name in a message may be no Unicode
        try:
            main(*args, **kwargs)
            _flush(is_logged)
        except SystemExit:
            _flush(is_logged)
            raise
        except BrokenPipeError:
            if is_read():  # it is another pipe that broke
                raise
            os._exit(UNREAD_STATUS)
        except KeyboardInterrupt:
            _flush(is_logged)
            if speaks():
                _tell("interrupted")
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except MegapolyError as error:
            _flush(is_logged)
            if speaks() and not isinstance(error, Echo):
                _tell("error: " + " ".join(str(error).split()))
            else:
                _let_the_speaker_finish(error.status)
            # os._exit: a half-built process group must not keep the worker alive in its destructors.
            os._exit(error.status)

    return wrapped
