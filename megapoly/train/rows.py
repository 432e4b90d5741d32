"""The rows of metrics.jsonl: read as far as they are whole, and appended so that a full disk costs none of them."""

import contextlib
import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_WAITING = 10_000  # rows, of some KB


def rows_of(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl that are rows of a step, and what they say; none where there is no file."""
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the line that was being written when the run was killed, or none of ours
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield line, row


def drop_rows_after(path: Path, step: int) -> int:
    """Remove rows of metrics.jsonl past a step (a run that was stopped after its last checkpoint), and torn ones.

    Returns how many lines were none, but for the last, which may have been cut off by a kill.
    """
    if not path.exists():
        return 0
    rows = list(rows_of(path))
    *lines, last = path.read_bytes().split(b"\n")
    damaged = sum(map(bool, lines)) - len(rows) + any(line == last for line, _ in rows[-1:])
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(b"".join(line + b"\n" for line, row in rows if row["step"] <= step))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return damaged


def finite(value: Any) -> Any:
    """Plain data with every number that is not finite as None, since JSON has no name for it."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RowFile:
    """Appends rows; those that cannot be written wait in memory, the last MOST_WAITING of them, for the next write."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)

    @property
    def num_waiting(self) -> int:
        """Rows that are not in the file yet."""
        return len(self._waiting)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append what waits and these rows; OSError where all of them wait on, and nothing of them is in the file."""
        self._waiting.extend(json.dumps(finite(row), ensure_ascii=False).encode() + b"\n" for row in rows)
        content = b"".join(self._waiting)
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # a disk that is gone; the next start drops what is torn
                self._file.truncate(self._size)
            raise
        self._size += len(content)
        self._waiting.clear()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
