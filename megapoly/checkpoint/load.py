"""Finding and reading checkpoints."""

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megapoly.checkpoint.state import PieceLoadPlanner, pieces, training_state
from megapoly.checkpoint.storage import Reader, ShardFile, TensorRecord, read_json, read_records
from megapoly.checks import check_model
from megapoly.config import SECTIONS, build
from megapoly.errors import CheckpointError, ConfigError
from megapoly.optim.sharded import ShardedOptimizer
from megapoly.run_checks import check_ramp
from megapoly.sections import Config, ModelConfig

# What makes a model another one, after defaults are filled in.
_DECISIVE = (
    "num_layers hidden_size ffn_size num_attention_heads num_kv_heads head_dim position_embedding_type rotary_dim "
    "normalization norm_epsilon activation add_bias_linear parallel_residual tied width_multiple use_mup"
).split()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STEP = re.compile(r"step_[0-9]{8,}")


def find_checkpoint(path: str | Path) -> Path:
    """The step folder meant by a run, its checkpoints/ or a step folder itself; CheckpointError where there is none."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        pointer = folder / "latest"
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
            if not _STEP.fullmatch(name):
                raise CheckpointError(f"{pointer}: '{name[:40]}' is no step folder's name (step_ and 8 digits)")
            return folder / name
    if (path / "metadata.json").is_file():
        return path
    raise CheckpointError(
        f"{path}: no checkpoint here (neither `latest` nor metadata.json); give a run or a step folder"
    )


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint opened on one process: its configuration and its weights, whole tensor by whole tensor."""

    folder: Path

    @staticmethod
    def open(path: str | Path) -> "CheckpointReader":
        """Open a run, a checkpoints/ or a step folder; CheckpointError where it is none."""
        reader = CheckpointReader(find_checkpoint(path))
        _ = reader.config, reader.records
        return reader

    @cached_property
    def state(self) -> dict[str, Any]:
        """state.json, checked for the entries that everyone needs."""
        path = self.folder / "state.json"
        state = read_json(path)
        kinds = {"plan_fingerprint": str, "config": dict} | dict.fromkeys(
            ("step", "samples", "global_batch_size", "vocab_size"), int
        )
        for key, kind in kinds.items():
            value = state.get(key) if isinstance(state, dict) else None
            if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**62):
                raise CheckpointError(f"{path}: entry '{key}' is {str(value)[:40]}, not a {kind.__name__} that can be")
        if state.get("dtype") not in _DTYPES:
            raise CheckpointError(
                f"{path}: entry 'dtype' is {str(state.get('dtype'))[:40]}, not {' or '.join(_DTYPES)}"
            )
        if _STEP.fullmatch(self.folder.name) and int(self.folder.name[5:]) != state["step"]:
            raise CheckpointError(f"{path}: entry 'step' is {state['step']}, the folder is {self.folder.name}")
        return dict(state)

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        """All tensors, with their shapes and chunks."""
        return read_records(self.folder)

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
        return _DTYPES[self.state["dtype"]]

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
        if found != kinds or not all(
            type(value) is float and math.isfinite(value) for value in (*state["losses"], *state["norms"])
        ):
            raise CheckpointError(f"{self.folder / 'state.json'}: entry 'watch' is no state that can be")
        return dict(state)

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer that was saved with it: a file (SentencePiece), or the folder that has its tokenizer.json."""
        if (self.folder / "tokenizer.model").is_file():
            return self.folder / "tokenizer.model"
        return self.folder if (self.folder / "tokenizer.json").is_file() else None

    @property
    def names(self) -> list[str]:
        """Names of all parameters."""
        return [name.removeprefix("model.") for name in self.records if name.startswith("model.")]

    def get(self, name: str) -> Tensor:
        """A whole parameter in its training type, without padding rows."""
        record = self.records.get(f"model.{name}")
        if record is None:
            raise CheckpointError(f"{self.folder}: no parameter '{name}'")
        result = torch.empty(record.shape, dtype=record.dtype)
        for chunk in record.chunks:
            place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            result[place] = ShardFile(self.folder / chunk.file).read(f"model.{name}", chunk, record.dtype)
        return result.to(self.dtype)


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


def load_checkpoint(folder: Path, optimizer: ShardedOptimizer, weights_only: bool = False) -> None:
    """Read the state that this rank holds from a checkpoint of any layout; all ranks call it together.

    With weights_only the moments stay as they are (zero). Raises CheckpointError where this rank's part cannot be read.
    """
    state = training_state(optimizer)
    wanted = pieces(optimizer.buffers, {"model": state["model"]} if weights_only else state, for_saving=False)
    try:
        reader = Reader(folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            dcp.load(
                {"pieces": torch.empty(0)},  # the planner knows the pieces; an empty state would be read as "nothing"
                storage_reader=reader,
                planner=PieceLoadPlanner(wanted),
                no_dist=not dist.is_initialized(),
            )
    except CheckpointError as error:
        raise CheckpointError(str(error)) from None
    except dcp.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder}: cannot be loaded: {first}") from None
    optimizer.refresh_params()
