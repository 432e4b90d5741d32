"""The rows of metrics.jsonl: read as far as they are whole, and appended so that a full disk costs none of them."""

import contextlib
import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MOST_WAITING = 10_000  # rows, of some KB
MOST_BYTES = 1 << 24  # of a row


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a step in metrics.jsonl, one at a time; none where there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            yield from (row for _, row in _lines(file) if row is not None)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Lines with their ends, and what they say where they are rows; a line that is too long for one comes in parts."""
    is_rest = False
    while line := file.readline(MOST_BYTES):
        is_part = len(line) == MOST_BYTES and not line.endswith(b"\n")
        yield line, None if is_part or is_rest else _row(line)
        is_rest = is_part


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None  # the line that was being written when the run was killed, or none of ours
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def drop_rows_after(path: Path, step: int) -> int:
    """Remove rows of metrics.jsonl past a step (a run that was stopped after its last checkpoint), and torn ones.

    Returns how many lines were none, but for the last, which may have been cut off by a kill. One row is in memory at a
    time.
    """
    if not path.exists():
        return 0
    damaged, temporary = 0, path.with_name(path.name + ".tmp")
    with path.open("rb") as rows, temporary.open("wb") as file:
        for line, row in _lines(rows):
            if row is None:
                damaged += line.endswith(b"\n") and line != b"\n"
            elif row["step"] <= step:
                file.write(line.removesuffix(b"\n") + b"\n")
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
