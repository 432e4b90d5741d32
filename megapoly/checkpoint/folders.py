"""Names of checkpoints, and how their folders come and go so that a kill at any moment leaves only whole ones.

A folder gets its final name when all of it is on the disk, and loses that name before anything in it is deleted. What
is to become `latest` is on the disk before: where a kill comes between the two names, it counts as `latest` already.
What else a kill leaves has a name with a dot in front, and is swept when the next job starts.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megapoly.data.indexed import sync_directory
from megapoly.errors import CheckpointError
from megapoly.files import read_small
from megapoly.sections import CheckpointConfig

SHARD = re.compile(r"shard_[0-9]{5,9}\.safetensors")
_STEP = re.compile(r"step_[0-9]{8,18}")
_LEFTOVER = re.compile(r"\.(step_[0-9]{8,18})\.[0-9a-f]+\.(tmp|old|latest)")
LATEST = "latest"
_ADVICE = "write the name of a step folder into it, or remove it to go on from the newest"
_MOST_BYTES = 64  # of `latest`


def roots_of(cfg: CheckpointConfig) -> list[Path]:
    """The directories that a run saves into: its own and the second one, where it is configured."""
    return [Path(root) for root in (cfg.save, cfg.save_copy) if root is not None]


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder is named after; None for another name."""
    return int(folder.name[5:]) if _STEP.fullmatch(folder.name) else None


def read_latest(root: Path) -> Path | None:
    """The folder that `latest` names, or was about to when a kill came, whether it is there or not; None without."""
    pointer = root / LATEST
    try:
        name = read_small(pointer, _MOST_BYTES).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{pointer}: cannot be read: {error.strerror}; {_ADVICE}") from None
    if not _STEP.fullmatch(name):  # none of our writes leaves this: what is meant, its writer has to say
        raise CheckpointError(f"{pointer}: {name[:40]!r} is no step folder's name (step_ and 8 digits); {_ADVICE}")
    pending = [next_ for next_ in _pending(root) if _is_older(root / name, root / _step_in(next_))]
    return root / (_step_in(max(pending, key=_step_in)) if pending else name)


def _pending(root: Path) -> list[Path]:
    """What was to become `latest`, of folders that have their names; but not where somebody wrote `latest` since."""
    found = [path for path in root.glob(".step_*.latest") if _LEFTOVER.fullmatch(path.name)]
    try:
        written = (root / LATEST).stat().st_mtime_ns
        return [path for path in found if (root / _step_in(path)).is_dir() and path.stat().st_mtime_ns >= written]
    except FileNotFoundError:
        return []  # a job that runs has just made one of them `latest`


def _step_in(leftover: Path) -> str:
    return leftover.name.split(".")[1]


def step_folders(root: Path) -> list[Path]:
    """The finished checkpoints of a directory, the newest first."""
    folders = [path for path in root.glob("step_*") if step_of(path) is not None and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def find_folders(path: str | Path) -> list[Path]:
    """The step folders meant by a run, its checkpoints/ or a step folder itself, the preferred first.

    That is the one that `latest` names, then the older ones: what is newer belongs to a future that was given up. One
    that is not there is in the list as well. Without `latest` (a kill before the first was written) all are meant.
    """
    path = Path(path)
    for root in (path, path / "checkpoints"):
        named, present = read_latest(root), step_folders(root)
        if named is not None:
            return [named, *(folder for folder in present if folder.name != named.name and _is_older(folder, named))]
        if present:
            return present
    is_named_so = step_of(path) is not None and path.is_dir()
    return [path] if is_named_so or (path / "metadata.json").is_file() else []


def _is_older(folder: Path, than: Path) -> bool:
    return int(folder.name[5:]) < int(than.name[5:])


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: of all the newest `last` (None: all), those of every `every`th step, and `always`."""

    last: int | None = None
    every: int | None = None
    always: frozenset[int] = frozenset()

    def outdated(self, steps: list[int]) -> list[int]:
        """Of the steps that have a checkpoint, those whose one may go."""
        last = self.last if self.last is not None or self.every is None else 1
        if last is None:
            return []
        older = sorted(steps, reverse=True)[last:]
        return [step for step in older if step not in self.always and not (self.every and step % self.every == 0)]


def publish(temporary: Path, token: str) -> Path:
    """Give a finished folder `.NAME.token.tmp` its name and point `latest` at it; an older one of that name goes."""
    root, name = temporary.parent, _step_in(temporary)
    final = root / name
    sync_directory(temporary)
    if final.exists():  # a resume from an earlier step reached this one again
        remove(final, token)
    pointer = _pointer(root, name, token)
    temporary.rename(final)
    sync_directory(root)
    pointer.replace(root / LATEST)
    sync_directory(root)
    return final


def _pointer(root: Path, name: str, token: str) -> Path:
    """A file that can become `latest`, on the disk."""
    pointer = root / f".{name}.{token}.latest"
    with pointer.open("w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    return pointer


def _point(root: Path, name: str, token: str) -> None:
    """Make `latest` name a folder."""
    _pointer(root, name, token).replace(root / LATEST)
    sync_directory(root)


def remove(folder: Path, token: str) -> None:
    """Delete a checkpoint; it has lost its name before the first of its files goes."""
    old = folder.with_name(f".{folder.name}.{token}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    sync_directory(folder.parent)
    _delete(old)


def go_back(root: Path, step: int, token: str) -> list[Path]:
    """Point `latest` at the newest checkpoint up to a step, and delete those after it; returns these.

    Theirs is a future that was given up: one of them would be taken for a part of the run once it has come further.
    """
    folders = step_folders(root)
    kept = next((folder for folder in folders if int(folder.name[5:]) <= step), None)
    if kept is not None:
        _point(root, kept.name, token)
    elif (root / LATEST).exists():
        (root / LATEST).unlink()
        sync_directory(root)
    gone = [folder for folder in folders if int(folder.name[5:]) > step]
    for folder in gone:
        remove(folder, token)
    return gone


def prune(root: Path, retention: Retention, spared: Path | None, token: str) -> list[Path]:
    """Delete what retention lets go, never what `latest` names or `spared`; newer folders than `latest`'s are left."""
    named = read_latest(root)
    if named is None:
        return []
    present = [folder for folder in step_folders(root) if folder == named or _is_older(folder, named)]
    outdated = set(retention.outdated([int(folder.name[5:]) for folder in present]))
    gone = [f for f in present if int(f.name[5:]) in outdated and f != named and (spared is None or f != spared)]
    for folder in gone:
        remove(folder, token)
    return gone


def sweep(root: Path) -> list[Path]:
    """Delete what earlier jobs left unfinished in their saves and deletions; what was to be `latest` becomes it."""
    if (named := read_latest(root)) is not None:
        for pointer in _pending(root):
            if _step_in(pointer) == named.name:
                pointer.replace(root / LATEST)
        sync_directory(root)
    left = [path for path in root.glob(".step_*") if _LEFTOVER.fullmatch(path.name)]
    for path in left:
        _delete(path)
    return left


def _delete(path: Path) -> None:
    """Delete a file or folder; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
