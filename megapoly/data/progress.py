"""How far a long pass over files is: a bar with MB/s and the time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from megapoly.log import duration


class Progress:
    """Counts bytes of the input's files, out of `total`, and documents.

    With `bar` and a terminal it is a bar there, else a line every `interval` documents; `interval` 0 is silent.
    """

    def __init__(self, total: int, interval: int, log: Callable[[str], None], bar: bool) -> None:
        self._total, self._interval, self._log = total, interval, log
        self._wants_bar = bar and sys.stderr.isatty()
        self._bar: Any = None
        self._begin = time.monotonic()
        self._first_bytes, self._bytes, self._documents = 0, 0, 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, done_bytes: int, documents: int) -> None:
        """Count from here; what an earlier run did is no part of the speed."""
        self._begin = time.monotonic()
        self._first_bytes = self._bytes = done_bytes
        self._documents = documents
        if self._wants_bar:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread of its own: workers are forked only where there is one thread
            self._bar = tqdm(total=self._total, initial=done_bytes, unit="B", unit_scale=True, mininterval=0.5)

    def advance(self, done_bytes: int, documents: int) -> None:
        """So many bytes are done in all, and so many documents more."""
        before, self._documents = self._documents, self._documents + documents
        if self._bar is not None:
            self._bar.update(done_bytes - self._bytes)
            self._bar.set_postfix_str(f"{self._documents} documents", refresh=False)
        self._bytes = done_bytes
        if self._bar is None and self._interval and self._documents // self._interval > before // self._interval:
            seconds = max(time.monotonic() - self._begin, 1e-9)
            speed = (done_bytes - self._first_bytes) / seconds
            left = duration((self._total - done_bytes) / speed) if speed else "?"
            share = 100 * done_bytes / max(1, self._total)
            self._log(f"{self._documents} documents, {share:.1f}%, {speed / 1e6:.2f} MB/s, {left} left")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.clear()
        if self._interval:
            self._log(text)
