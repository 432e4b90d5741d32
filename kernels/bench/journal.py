"""The rows of one script as they come, in a file that outlives a kill, a hang or a lost GPU: a restart goes on."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from results import Row, document_of, read_rows, write_json

LOST, STUCK = 3, 4  # exit statuses after which a restart with --resume goes on


class GpuLost(Exception):
    """The GPU answers no more in this process, whatever is asked of it."""


class Journal:
    """All rows so far. What is being measured lies in the file as rows that say so, in case no others follow."""

    def __init__(self, path: Path | None, name: str, head: dict[str, Any], resume: bool = False) -> None:
        self.path, self.name, self.head = path, name, head
        self.told: dict[str, Any] = {"failed": None}
        self.rows: list[Row] = []
        if resume and path is not None and path.exists():
            self.rows = read_rows(json.loads(path.read_text(encoding="utf-8")))

    def rows_of(self, operation: str, shape: str, implementation: str) -> list[Row]:
        """What an earlier process measured of this, or was measuring when it ended."""
        wanted = (operation, shape, implementation)
        return [row for row in self.rows if (row.operation, row.shape, row.implementation) == wanted]

    @contextmanager
    def measuring(self, rows: Sequence[Row], limit: float) -> Iterator[None]:
        """Inside, the file holds these rows as unfinished; after `limit` seconds (0: none) the process ends."""
        for row in rows:
            row.note = "did not finish; the process ended or was ended"
        self.write([*self.rows, *rows])
        watch = threading.Timer(limit, os._exit, (STUCK,))  # nothing softer ends a wait for a GPU that hangs
        watch.daemon = True
        if limit:
            watch.start()
        try:
            yield
        finally:
            watch.cancel()

    def add(self, rows: Sequence[Row]) -> None:
        """Keep what was measured."""
        self.rows += rows
        self.write(self.rows)

    def write(self, rows: Sequence[Row]) -> None:
        """Write the file, where there is one."""
        if self.path is not None:
            write_json(self.path, document_of(self.head, {self.name: self.told}, rows))
