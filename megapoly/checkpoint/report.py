"""Looks at checkpoints on any machine, without a GPU or the model: lists, verification, contents, differences."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.checkpoint.folders import LATEST, find_folders, read_latest, step_folders, step_of
from megapoly.checkpoint.load import CheckpointReader
from megapoly.checkpoint.shard import ShardReader, reading
from megapoly.checkpoint.state import Piece
from megapoly.checkpoint.storage import Chunk, TensorRecord, check_beginning
from megapoly.errors import CheckpointError

_QUIET = ("config",)  # of state.json: too long for a line


def listing(path: str | Path) -> list[dict[str, Any]]:
    """One entry a finished checkpoint of a run or its checkpoints/, the newest first: step, samples, bytes, problem.

    Before them one of `latest` where that cannot be read, or of the folder that it names where there is none.
    """
    roots = [root for root in (Path(path), Path(path) / "checkpoints") if step_folders(root)]
    if not roots:
        find = find_folders(path)
        if not find:
            raise CheckpointError(f"{path}: no checkpoint here; give a run, its checkpoints/ or a step folder")
        return [_entry(find[0], None)]
    folders, entries, latest = step_folders(roots[0]), [], None
    try:
        latest = read_latest(roots[0])
    except CheckpointError as error:
        pointer = str(roots[0] / LATEST)
        entries = [{"folder": pointer, "step": None, "is_latest": False, "problem": str(error)}]
    if latest is not None and latest not in folders:
        folders.insert(0, latest)
    return entries + [_entry(folder, latest) for folder in folders]


def _entry(folder: Path, latest: Path | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"folder": str(folder), "step": step_of(folder), "is_latest": folder == latest}
    try:
        reader = CheckpointReader.at(folder)
    except CheckpointError as error:
        return entry | {"problem": str(error)}
    size = sum(record.size for record in reader.contents.files.values())
    layout = reader.state.get("layout")
    layout = layout if isinstance(layout, dict) else {}  # nothing but this listing needs it
    return entry | {"step": reader.step, "samples": reader.samples, "bytes": size, "layout": layout, "problem": None}


def listed(entry: dict[str, Any]) -> str:
    """An entry of a listing as a line."""
    mark = "*" if entry["is_latest"] else " "
    if entry["problem"] is not None:
        return f"{mark} {entry['folder']}  DAMAGED: {entry['problem']}"
    layout = " x ".join(f"{name.upper()} {size}" for name, size in entry["layout"].items())
    samples, size = f"{entry['samples']:,} samples", f"{entry['bytes'] / 1e9:.3f} GB"
    return f"{mark} {entry['folder']}  step {entry['step']:,}  {samples}  {size}  {layout}".rstrip()


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, after reading every byte of it; one chunk is in memory at a time."""
    try:
        reader = CheckpointReader.at(folder)
    except CheckpointError as error:
        return [str(error)]
    problems: dict[str, None] = {}  # in order, each once: of a file that cannot be read all its tensors say the same
    for name, record in reader.contents.files.items():
        try:
            check_beginning(folder, name, record)
        except CheckpointError as error:
            problems[str(error)] = None
    with reading(folder) as shards:
        for name, tensor, chunk in _in_file_order(reader.records):
            try:
                shards.read(name, tensor, chunk)
            except CheckpointError as error:
                problems[str(error)] = None
    return list(problems)


def _in_file_order(records: Mapping[str, TensorRecord]) -> list[tuple[str, TensorRecord, Chunk]]:
    chunks = [(name, record, chunk) for name, record in records.items() for chunk in record.chunks]
    return sorted(chunks, key=lambda entry: (entry[2].file, entry[2].begin))


def contents(reader: CheckpointReader) -> dict[str, Any]:
    """What a checkpoint holds: its state, and shape, type and number of chunks of every tensor."""
    tensors = {
        name: {"shape": record.shape, "dtype": str(record.dtype).removeprefix("torch."), "chunks": len(record.chunks)}
        for name, record in sorted(reader.records.items())
    }
    return {"folder": str(reader.folder), "state": reader.state, "tensors": tensors}


def described(found: dict[str, Any]) -> str:
    """What a checkpoint holds, as lines."""
    state = [f"  {key} {json.dumps(value)}" for key, value in found["state"].items() if key not in _QUIET]
    rows = [f"  {name}  {tuple(t['shape'])} {t['dtype']}, {t['chunks']} chunks" for name, t in found["tensors"].items()]
    return "\n".join([found["folder"], *state, *rows])


def differences(one: CheckpointReader, other: CheckpointReader) -> Iterator[str]:
    """In what two checkpoints differ, a line each: entries of their states and configurations, then tensors.

    Tensors are compared bit by bit, a chunk of the first at a time.
    """
    for key in sorted(one.state.keys() | other.state.keys()):
        if key not in _QUIET:
            yield from _different(key, one.state.get(key), other.state.get(key))
    yield from _different("config", one.state["config"], other.state["config"])
    for name in sorted(one.records.keys() | other.records.keys()):
        kinds = [r and (r.shape, str(r.dtype)) for r in (one.records.get(name), other.records.get(name))]
        if kinds[0] != kinds[1]:
            yield from _different(name, *kinds)
            continue
        with reading(one.folder) as shards:
            count, most = _compare(name, one, other, shards)
        if count:
            yield f"{name}: {count:,} of {torch.Size(one.records[name].shape).numel():,} entries, by {most:.3g} at most"


def _compare(name: str, one: CheckpointReader, other: CheckpointReader, shards: ShardReader) -> tuple[int, float]:
    """How many entries of a tensor differ in their bits, and the largest difference."""
    record, count, most = one.records[name], 0, 0.0
    for chunk in record.chunks:
        mine = shards.read(name, record, chunk)
        theirs = torch.empty_like(mine)
        other.read([Piece(name, record.shape, chunk.offsets, theirs)])
        differs = _bits(mine) != _bits(theirs)
        if differs.any():
            count += int(differs.sum())
            most = max(most, float((mine.double() - theirs.double()).abs().max()))
    return count, most


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _different(name: str, one: object, other: object) -> Iterator[str]:
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from _different(f"{name}.{key}", one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list):
        places = [i for i in range(max(len(one), len(other))) if one[i : i + 1] != other[i : i + 1]]
        yield from _different(f"{name}[{places[0]}]", *(dict(enumerate(v)).get(places[0]) for v in (one, other)))
        if len(places) > 1:
            yield f"{name}: {len(places) - 1:,} more of {max(len(one), len(other)):,} entries"
    else:
        yield f"{name}: {_short(one)} in the first, {_short(other)} in the second"


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
