"""Finding and reading checkpoints."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.checkpoint.folders import find_folders, step_of
from megapoly.checkpoint.shard import reading
from megapoly.checkpoint.state import Piece, pieces, training_state
from megapoly.checkpoint.storage import (
    DTYPES,
    Chunk,
    Contents,
    TensorRecord,
    check_beginning,
    read_contents,
    read_json,
)
from megapoly.checks import check_model
from megapoly.config import SECTIONS, build
from megapoly.errors import CheckpointError, ConfigError, DamageError
from megapoly.optim.sharded import ShardedOptimizer
from megapoly.parallel.collectives import all_gather
from megapoly.parallel.mesh import Mesh
from megapoly.run_checks import check_ramp
from megapoly.sections import Config, ModelConfig

_PROBLEM_BYTES = 512  # of what ranks tell each other about damage
_ENTRIES = {"plan_fingerprint": str, "dtype": str, "config": dict} | dict.fromkeys(
    ("step", "samples", "global_batch_size", "vocab_size"), int
)
_KINDS = {str: "a text", dict: "an object with entries", int: "a whole number from 0 to 2^62"}
# What makes a model another one, after defaults are filled in.
_DECISIVE = (
    "num_layers hidden_size ffn_size num_attention_heads num_kv_heads head_dim position_embedding_type rotary_dim "
    "normalization norm_epsilon activation add_bias_linear parallel_residual tied width_multiple use_mup"
).split()


def find_checkpoint(path: str | Path) -> Path:
    """The step folder meant by a run, its checkpoints/ or a step folder itself; CheckpointError where there is none."""
    folders = find_folders(path)
    if not folders:
        raise CheckpointError(
            f"{path}: no checkpoint here (neither `latest` nor metadata.json); give a run or a step folder"
        )
    return folders[0]


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint opened on one process: its configuration and its weights, whole tensor by whole tensor."""

    folder: Path

    @staticmethod
    def open(path: str | Path) -> "CheckpointReader":
        """Open a run, a checkpoints/ or a step folder; CheckpointError where it is none."""
        return CheckpointReader.at(find_checkpoint(path))

    @staticmethod
    def at(folder: Path) -> "CheckpointReader":
        """Open a step folder; CheckpointError, a DamageError where bytes are missing or are not what was written."""
        reader = CheckpointReader(folder)
        _ = reader.contents, reader.config
        return reader

    @cached_property
    def state(self) -> dict[str, Any]:
        """state.json, checked for the entries that everyone needs."""
        path = self.folder / "state.json"
        state = read_json(self.folder, path.name, self.contents)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: is {str(state)[:40]}, not an object with entries")
        for key, kind in _ENTRIES.items():
            value = state.get(key)
            if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**62):
                raise CheckpointError(f"{path}: entry '{key}' is {str(value)[:40]}, not {_KINDS[kind]}")
        if state["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: entry 'dtype' is {state['dtype'][:40]}, not {' or '.join(DTYPES)}")
        if (decay := state.get("lr_decay_iters")) is not None and (type(decay) is not int or not 0 <= decay < 2**62):
            raise CheckpointError(f"{path}: entry 'lr_decay_iters' is {str(decay)[:40]}, not {_KINDS[int]}")
        if step_of(self.folder) not in (None, state["step"]):  # a copy or a link under another's name
            raise DamageError(f"{path}: entry 'step' is {state['step']}, the folder is {self.folder.name}")
        return dict(state)

    @cached_property
    def contents(self) -> Contents:
        """All tensors and files."""
        return read_contents(self.folder)

    @property
    def records(self) -> dict[str, TensorRecord]:
        """All tensors, with their shapes and chunks."""
        return self.contents.tensors

    @cached_property
    def config(self) -> Config:
        """The resolved configuration of the run that wrote it."""
        tree = self.state["config"]
        try:
            for name in SECTIONS:
                if not isinstance(tree.get(name, {}), dict):
                    raise ConfigError(f"section '{name}' holds no keys")
            config = Config(**{name: build(cls, tree.get(name, {}), name) for name, cls in SECTIONS.items()})
            check_model(config.model)
            check_ramp(config.train)
        except ConfigError as error:
            raise CheckpointError(f"{self.folder / 'state.json'}: config: {error}") from None
        return config

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def samples(self) -> int:
        """Samples seen."""
        return int(self.state["samples"])

    def counts(self, name: str) -> list[int] | None:
        """A list of whole numbers of at least 0 in state.json; None where a checkpoint has not got it."""
        counts = self.state.get(name)
        if counts is None:
            return None
        if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 2**62 for n in counts):
            raise CheckpointError(f"{self.folder / 'state.json'}: entry '{name}' is no list of counts")
        return list(counts)

    @property
    def optimizer_steps(self) -> int:
        """Updates that the moments have seen: fewer than steps where some were skipped, or a stage began anew."""
        default = self.step - int(self.loss_scaler["skipped_steps"])
        steps = self.state.get("optimizer_steps", default)
        if type(steps) is not int or not 0 <= steps <= self.step:
            raise CheckpointError(f"{self.folder / 'state.json'}: entry 'optimizer_steps' is no count of updates")
        return steps

    @property
    def left_out(self) -> tuple[tuple[int, int], ...]:
        """Ranges of samples that its data plan leaves out, ends excluded."""
        ranges = self.state.get("left_out", [])
        is_sound = isinstance(ranges, list) and all(
            isinstance(r, list) and len(r) == 2 and all(type(n) is int for n in r) and 0 <= r[0] < r[1] for r in ranges
        )
        if not is_sound:
            raise CheckpointError(f"{self.folder / 'state.json'}: entry 'left_out' is no list of ranges of samples")
        return tuple((begin, end) for begin, end in ranges)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, without padding."""
        return int(self.state["vocab_size"])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters in training (the master weights on disk may be wider)."""
        return DTYPES[self.state["dtype"]]

    @property
    def loss_scaler(self) -> dict[str, Any]:
        """State of the loss scaler; no step was skipped where there is none."""
        state = self.state.get("loss_scaler", {"skipped_steps": 0})
        rule = {"scale": float, "good_steps": int, "overflows_left": int}
        found = {name: type(value) for name, value in state.items()} if isinstance(state, dict) else {}
        is_sound = found in ({"skipped_steps": int}, {"skipped_steps": int} | rule)
        if not is_sound or not 0 < state.get("scale", 1.0) < math.inf or not 0 <= state["skipped_steps"] <= self.step:
            raise CheckpointError(f"{self.folder / 'state.json'}: entry 'loss_scaler' is no state that can be")
        return dict(state)

    @property
    def watch(self) -> dict[str, Any]:
        """What was usual of losses and gradient norms, and the updates not taken; nothing where it does not say."""
        kinds = {"skipped_steps": int, "skipped_in_a_row": int, "losses": list, "norms": list}
        state = self.state.get("watch", {name: kind() for name, kind in kinds.items()})
        found = {name: type(value) for name, value in state.items()} if isinstance(state, dict) else {}
        if (
            found != kinds
            or not all(type(value) is float and math.isfinite(value) for value in (*state["losses"], *state["norms"]))
            or not 0 <= state["skipped_in_a_row"] <= state["skipped_steps"] <= self.step
        ):
            raise CheckpointError(f"{self.folder / 'state.json'}: entry 'watch' is no state that can be")
        return dict(state)

    @property
    def data_hashes(self) -> dict[str, str]:
        """Hashes of the files that it was trained on and of its tokenizer, by name."""
        hashes = self.state.get("data")
        if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
            raise CheckpointError(f"{self.folder / 'state.json'}: entry 'data' is no table of hashes")
        return dict(hashes)

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer that was saved with it: a file (SentencePiece), or the folder that has its tokenizer.json."""
        for name in self.contents.files:
            if name.startswith(("tokenizer", "special_tokens", "chat_template")):
                check_beginning(self.folder, name, self.contents.files[name])
        if "tokenizer.model" in self.contents.files:
            return self.folder / "tokenizer.model"
        return self.folder if "tokenizer.json" in self.contents.files else None

    @property
    def names(self) -> list[str]:
        """Names of all parameters."""
        return [name.removeprefix("model.") for name in self.records if name.startswith("model.")]

    def get(self, name: str) -> Tensor:
        """A whole parameter in its training type, without padding rows."""
        record = self.records.get(f"model.{name}")
        if record is None:
            raise CheckpointError(f"{self.folder}: no parameter '{name}'")
        whole = torch.empty(record.shape, dtype=record.dtype)
        self.read([Piece(f"model.{name}", record.shape, (0,) * whole.dim(), whole)])
        return whole.to(self.dtype)

    @torch.no_grad()
    def read(self, wanted: Iterable[Piece]) -> None:
        """Fill pieces from whatever chunks there are, with one chunk in memory beside them. Raises CheckpointError."""
        with reading(self.folder) as shards:
            for read in plan_reads(self.records, wanted):
                places = [_common(p, read.chunk) for p in read.pieces]
                targets = [_part(p.tensor, p.offsets, place) for p, place in zip(read.pieces, places, strict=True)]
                takes_all = len(targets) == 1 and targets[0].shape == read.chunk.sizes
                stored = shards.read(read.name, self.records[read.name], read.chunk, targets[0] if takes_all else None)
                for target, place in zip(targets, places, strict=True):
                    if target is not stored:
                        target.copy_(_part(stored, read.chunk.offsets, place))


def check_same_model(
    reader: CheckpointReader, m: ModelConfig, vocab_size: int, shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> None:
    """Refuse a checkpoint of another model, naming the first option or parameter that differs, with both values.

    `shapes` are the names and whole shapes of this run's parameters.
    """
    for key in _DECISIVE:
        there, here = getattr(reader.config.model, key), getattr(m, key)
        if there != here:
            raise CheckpointError(
                f"{reader.folder}: the checkpoint is of another model: {key} is {there} there and {here} in this run"
            )
    if reader.vocab_size != vocab_size:
        raise CheckpointError(
            f"{reader.folder}: the checkpoint is of another model: vocab_size is {reader.vocab_size} there "
            f"and {vocab_size} in this run"
        )
    for name, shape in shapes:
        record = reader.records.get(f"model.{name}")
        if record is None or record.shape != shape:
            found = "missing" if record is None else f"{record.shape} there"
            raise CheckpointError(f"{reader.folder}: parameter '{name}' is {found}, this run wants {shape}")


@dataclass(frozen=True)
class Read:
    """A chunk of tensor `name`, and the pieces that take something of it."""

    name: str
    chunk: Chunk
    pieces: tuple[Piece, ...]


def plan_reads(records: Mapping[str, TensorRecord], wanted: Iterable[Piece]) -> list[Read]:
    """The chunks that hold something of the pieces, each once, in the order in which they lie in the shards."""
    by_name: dict[str, list[Piece]] = {}
    for p in wanted:
        by_name.setdefault(p.name, []).append(p)
    reads = []
    for name, parts in by_name.items():
        record = records.get(name)
        if record is None or record.shape != parts[0].shape:
            found = "nothing" if record is None else record.shape
            raise CheckpointError(f"the checkpoint has {found} for '{name}', the model wants {parts[0].shape}")
        for chunk in record.chunks:
            if takers := tuple(p for p in parts if all(begin < end for begin, end in _common(p, chunk))):
                reads.append(Read(name, chunk, takers))
    return sorted(reads, key=lambda read: (read.chunk.file, read.chunk.begin))


def _common(p: Piece, chunk: Chunk) -> list[tuple[int, int]]:
    """Begin and end, by dimension, of what a piece and a chunk have in common in the whole tensor."""
    sides = zip(p.offsets, p.tensor.shape, chunk.offsets, chunk.sizes, strict=True)
    return [(max(o, c), min(o + size, c + s)) for o, size, c, s in sides]


def _part(tensor: Tensor, offsets: tuple[int, ...], place: list[tuple[int, int]]) -> Tensor:
    """The entries of a rectangle at `offsets` that lie at a place in the whole tensor."""
    return tensor[tuple(slice(begin - o, end - o) for (begin, end), o in zip(place, offsets, strict=True))]


def load_checkpoint(checkpoint: CheckpointReader, optimizer: ShardedOptimizer, weights_only: bool = False) -> None:
    """Read the state that this rank holds from a checkpoint of any layout; all ranks call it together.

    With weights_only the moments stay as they are (zero). Raises DamageError, on all ranks alike, where any of them
    finds bytes that are not what was written; the state is then undefined. Other CheckpointErrors as they come.
    """
    state = training_state(optimizer)
    wanted = pieces(optimizer.buffers, {"model": state["model"]} if weights_only else state, for_saving=False)
    problem, world = "", optimizer.buffers.mesh.world
    try:
        # A share of what no tensor needs but those who take the checkpoint elsewhere: headers, the tokenizer's files.
        for name, record in list(checkpoint.contents.files.items())[world.rank :: world.size]:
            check_beginning(checkpoint.folder, name, record)
        checkpoint.read(wanted)
    except DamageError as damage:
        problem = str(damage)
    if problem := _first_problem(problem, optimizer.buffers.mesh):
        raise DamageError(problem)
    optimizer.refresh_params()


def _first_problem(problem: str, mesh: Mesh) -> str:
    """The first rank's problem, on all ranks; empty where none has one."""
    content = torch.zeros(1, _PROBLEM_BYTES, dtype=torch.uint8)
    encoded = problem.encode(errors="backslashreplace")[:_PROBLEM_BYTES]
    content[0, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    everyone = all_gather(content.to(mesh.device), mesh.world).cpu()
    found = (bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in everyone)
    return next(filter(None, found), "")
