"""What a person reads while a run goes on: one live line on a terminal, plain lines elsewhere."""

import shutil
import sys


class Console:
    """Prints on the main rank only; other ranks stay silent."""

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main
        self._is_live = is_main and sys.stdout.isatty()
        self._line_is_open = False

    def say(self, text: str = "") -> None:
        """A lasting line."""
        if self.is_main:
            line, self._line_is_open = "\n" * self._line_is_open + text, False
            _print(line)

    def progress(self, text: str) -> None:
        """The state of the run: overwrites the last progress on a terminal, a line of its own elsewhere."""
        if self._is_live:
            width = shutil.get_terminal_size().columns  # a longer line would wrap, and only its end be overwritten
            _print(f"\r\x1b[2K{text[: width - 1]}", end="")
            self._line_is_open = True
        elif self.is_main:
            _print(text)


def _print(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError:  # a full disk under the log costs its lines, not the run
        pass


def duration(seconds: float) -> str:
    """1h02m, 3m20s or 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
