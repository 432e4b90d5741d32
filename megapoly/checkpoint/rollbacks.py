"""The rollbacks of a run: rollbacks.json beside its checkpoints, a list of what was gone back from and left out."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megapoly.checkpoint.storage import read_json, sync_directory, write_text
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
    if not path.exists():
        return []
    entries = read_json(path)
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
    write_text(root / NAME, json.dumps([dataclasses.asdict(rollback) for rollback in rollbacks], indent=1) + "\n")
    sync_directory(root)


def forget_rollbacks(root: Path) -> None:
    """Remove the record of a run that begins anew."""
    (root / NAME).unlink(missing_ok=True)
