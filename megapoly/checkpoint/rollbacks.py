"""The rollbacks of a run: rollbacks.json beside its checkpoints, a list of what was gone back from and left out."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megapoly.checkpoint.folders import sync_directory
from megapoly.checkpoint.storage import write_durably
from megapoly.errors import CheckpointError

NAME = "rollbacks.json"


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
        entries = json.loads(path.read_bytes())
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
        if found != kinds or not 0 <= entry["begin"] < entry["end"]:
            raise CheckpointError(f"{path}: {str(entry)[:80]} is no rollback that can be; mend it or remove the file")
    return [Rollback(**entry) for entry in entries]


def write_rollbacks(root: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace the record durably."""
    entries = [dataclasses.asdict(rollback) for rollback in rollbacks]
    write_durably(root / NAME, json.dumps(entries, indent=1, ensure_ascii=False).encode())
    sync_directory(root)


def forget_rollbacks(root: Path) -> None:
    """Remove the record of a run that begins anew."""
    (root / NAME).unlink(missing_ok=True)
