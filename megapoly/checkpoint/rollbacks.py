"""The rollbacks of a run: rollbacks.json beside its checkpoints, a list of what was gone back from and left out."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megapoly.checkpoint.folders import sync_directory
from megapoly.checkpoint.storage import write_durably
from megapoly.errors import CheckpointError
from megapoly.files import read_small

NAME = "rollbacks.json"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Rollback:
    """From a spike at `step` back to the checkpoint of step `to`; samples begin to end are left out from then on."""

    step: int
    why: str
    to: int
    begin: int
    end: int


def read_rollbacks(root: Path) -> list[Rollback]:
    """Those of a directory of checkpoints, the first one first; CheckpointError for a damaged record."""
    path = root / NAME
    try:
        entries = json.loads(read_small(path, _MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({error}); mend it or remove the file") from None
    kinds = {field.name: field.type for field in dataclasses.fields(Rollback)}
    if not isinstance(entries, list):
        raise CheckpointError(f"{path}: is no list of rollbacks; mend it or remove the file")
    for entry in entries:
        found = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else {}
        is_sound = found == kinds and all(0 <= entry[key] < 2**62 for key, kind in kinds.items() if kind is int)
        if not is_sound or not entry["begin"] < entry["end"]:
            raise CheckpointError(f"{path}: {str(entry)[:80]} is no rollback that can be; mend it or remove the file")
    return [Rollback(**entry) for entry in entries]


def rollbacks_of(roots: Sequence[Path]) -> list[Rollback]:
    """Those of a run, which are in each of its directories; after a kill between two of them in the first alone."""
    return max((read_rollbacks(root) for root in roots), key=len)


def write_rollbacks(root: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace the record durably."""
    entries = [dataclasses.asdict(rollback) for rollback in rollbacks]
    write_durably(root / NAME, json.dumps(entries, indent=1).encode())
    sync_directory(root)


def level_rollbacks(roots: Sequence[Path], is_resume: bool) -> None:
    """Give each directory of a run that begins its whole record; none where it begins anew. Raises CheckpointError."""
    records = rollbacks_of(roots) if is_resume else []
    for root in roots:
        try:
            if not records:
                (root / NAME).unlink(missing_ok=True)
            elif read_rollbacks(root) != records:
                root.mkdir(parents=True, exist_ok=True)
                write_rollbacks(root, records)
        except OSError as error:
            raise CheckpointError(f"{root / NAME}: cannot be written: {error.strerror}") from None
