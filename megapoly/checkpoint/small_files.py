"""Reading the small files of a checkpoint: none but regular ones, and no more of them than they can have."""

import os
import stat
from pathlib import Path

from megapoly.errors import CheckpointError, DamageError


def read_small(path: Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes; OSError where it is longer or no regular file.

    A pipe is not waited for, and nothing is read of a device, which may have no end.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "it is no regular file")
        if found.st_size > most:
            raise OSError(0, f"it has {found.st_size:,} bytes, more than the {most:,} that it can have")
        return file.read(found.st_size)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What it means that a file of a checkpoint cannot be read: damage, unless this user alone may not read it."""
    text = f"{path}: cannot be read: {error.strerror}"
    if isinstance(error, PermissionError):
        return CheckpointError(f"{text}; let this user read it, or start as the one who wrote it")
    return DamageError(text)
