"""Reading small files whole: none but regular ones, and no more of them than they can have."""

import os
import stat
from pathlib import Path


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
