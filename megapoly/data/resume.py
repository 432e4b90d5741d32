"""What a long run keeps beside its output so that a kill costs little: who writes, how far it is, from what."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megapoly.errors import DataError

FORMAT = 1
_held: list[IO[str]] = []


@contextmanager
def only_writer(outputs: Sequence[str]) -> Iterator[None]:
    """Hold the right to write these datasets until the end; it ends with the process, however that ends.

    Raises DataError where another process has it.
    """
    held: list[tuple[str, IO[str]]] = []
    try:
        for output in sorted(outputs):
            held.append((f"{output}.lock", _lock(f"{output}.lock", output)))
            _held.append(held[-1][1])
        yield
    finally:
        for path, file in reversed(held):
            Path(path).unlink(missing_ok=True)  # while the lock is held: who waits for it finds that it is gone
            _held.remove(file)
            file.close()


def leave_to_parent() -> None:
    """In a forked child: what `only_writer` holds is the parent's alone, and ends with it."""
    for file in _held:
        file.close()
    _held.clear()


def _lock(path: str, output: str) -> IO[str]:
    while True:
        file = open(path, "a+", encoding="ascii")  # noqa: SIM115  held by only_writer
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(20).strip()
            file.close()
            who = f"process {owner}" if owner.isdigit() else "another process"
            raise DataError(f"{output}: is being written by {who}; wait for it or give another prefix") from None
        try:
            is_same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except FileNotFoundError:
            is_same = False
        if is_same:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()


class Workspace:
    """The folder PREFIX.partial: half-written outputs, and a state that is replaced as a whole or not at all."""

    def __init__(self, prefix: str) -> None:
        self.folder = Path(f"{prefix}.partial")
        self._state = self.folder / "state.json"

    def begin(self, options: dict[str, Any], inputs: list[dict[str, Any]], restart: bool) -> dict[str, Any] | None:
        """Make the folder; the state that an interrupted run of the same options over the same inputs has left.

        Raises DataError that names what differs, where something does.
        """
        state = None if restart else self._read()
        if state is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            return None
        differing = _difference(state.get("options"), options) or _changed_input(state.get("inputs"), inputs)
        if differing:
            raise DataError(
                f"{self.folder}: an earlier run lies here, {differing}; give the same again, or --restart to begin anew"
            )
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state; what it describes must be on the disk already."""
        temporary = self.folder / "state.json.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._state)
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @property
    def is_resumable(self) -> bool:
        """Whether there is anything to go on with."""
        return self._state.exists()

    def forget(self) -> None:
        """Let the next run begin anew, whatever its options; logs stay."""
        self._state.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all of it; the state first, so that what is half removed is never gone on with."""
        self.forget()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            state = None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise DataError(f"{self._state}: is damaged or of another version; give --restart to begin anew")
        return state


def _difference(old: Any, new: dict[str, Any]) -> str:
    old = old if isinstance(old, dict) else {}
    for name in {**new, **old}:  # also what only one of them has, as without `dedup` the other
        if old.get(name) != new.get(name):
            return f"begun with {name} {old.get(name)!r} instead of {new.get(name)!r}"
    return ""


def _changed_input(old: Any, new: list[dict[str, Any]]) -> str:
    old = old if isinstance(old, list) else []
    for before, now in zip(old, new, strict=False):
        if before != now:
            what = "has changed" if before.get("path") == now["path"] else f"stands where {before.get('path')} stood"
            return f"but the input {now['path']} {what}"
    return "" if len(old) == len(new) else f"begun with {len(old)} inputs instead of {len(new)}"
