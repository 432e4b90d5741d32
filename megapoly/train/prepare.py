"""What is settled before any process group exists: every mistake that config and file headers can tell.

`prepare` gives the same on every rank of every host that sees the same files.
"""

import dataclasses
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from megapoly.checkpoint.load import CheckpointReader, check_same_model
from megapoly.checks import check, check_schedule
from megapoly.data.batch_sizes import BatchSizes
from megapoly.data.curriculum import Plan, make_plan, open_sources
from megapoly.data.indexed import TokenStream
from megapoly.data.infilling import Infilling, make_infilling
from megapoly.errors import CheckpointError, ConfigError
from megapoly.model.count import parameter_shapes
from megapoly.sections import Config
from megapoly.tokenizer.load import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """What is known before any process group exists. Steps count from 1; the run starts after start_step."""

    cfg: Config
    tokenizer: Tokenizer | None
    vocab_size: int
    streams: list[TokenStream]
    valid_streams: list[TokenStream | None]
    plan: Plan
    num_samples: int
    checkpoint: CheckpointReader | None = None  # what to start from
    is_resume: bool = False  # the checkpoint is this run's own
    infilling: Infilling | None = None

    @property
    def takes_full_state(self) -> bool:
        """Whether moments, step and place in the data come from the checkpoint too."""
        return self.checkpoint is not None and (self.is_resume or not self.cfg.checkpoint.finetune)

    @property
    def start_step(self) -> int:
        """Steps that the checkpoint has done already."""
        return self.checkpoint.step if self.checkpoint is not None and self.takes_full_state else 0

    @property
    def start_sample(self) -> int:
        """Samples that it has seen: a run that ended in a short batch goes on right after it when it is made longer."""
        return self.checkpoint.samples if self.checkpoint is not None and self.takes_full_state else 0

    @property
    def num_steps(self) -> int:
        """The run's last step."""
        return self.start_step + self.batch_sizes.steps_until(self.num_samples, self.start_sample)

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences in each step."""
        return BatchSizes.of(self.cfg.train)

    @functools.cached_property
    def data_hashes(self) -> dict[str, str]:
        """What tells this run's files from others; see hashes_of_data."""
        return hashes_of_data(self.cfg, self.tokenizer)

    def samples_after(self, step: int) -> int:
        """Samples seen after a step that is not before start_step."""
        return min(self.batch_sizes.samples_after(step - self.start_step, self.start_sample), self.num_samples)


def resolve(cfg: Config, has_cuda: bool) -> Config:
    """Fill in what depends on the machine: precision, log interval, directories, lengths."""
    run_dir = Path(cfg.logging.run_dir)
    is_on_gpu = has_cuda and cfg.parallel.distributed_backend != "gloo"
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, block_length=cfg.data.block_length or cfg.model.seq_length),
        precision=dataclasses.replace(
            cfg.precision,
            bf16=is_on_gpu and not cfg.precision.fp16 if cfg.precision.bf16 is None else cfg.precision.bf16,
        ),
        checkpoint=dataclasses.replace(cfg.checkpoint, save=cfg.checkpoint.save or str(run_dir / "checkpoints")),
        logging=dataclasses.replace(cfg.logging, log_interval=cfg.logging.log_interval or (10 if is_on_gpu else 1)),
    )


def resolve_vocab_size(cfg: Config) -> tuple[int, Tokenizer]:
    """Rows of the vocabulary (without padding) and the tokenizer that fills them."""
    assert cfg.tokenizer.tokenizer_model is not None
    tokenizer = load_tokenizer(cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model)
    vocab_size = cfg.tokenizer.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size ({vocab_size}) is below the {tokenizer.vocab_size} entries of {tokenizer.path}; "
            "leave it out or raise it"
        )
    return vocab_size, tokenizer


def run_length(cfg: Config, plan: Plan) -> int:
    """Samples of the run: the stages' budgets, which train_iters and train_samples may only shorten."""
    sizes = BatchSizes.of(cfg.train)
    samples = plan.num_samples
    for name, value in (
        ("train_samples", cfg.train.train_samples),
        ("train_iters", cfg.train.train_iters and sizes.samples_after(cfg.train.train_iters)),
    ):
        if value is not None:
            if value > sizes.samples_after(sizes.steps_until(plan.num_samples)):
                raise ConfigError(
                    f"{name} would need {value} samples, the stages' budgets give {plan.num_samples}; "
                    "raise the budget of a stage instead"
                )
            samples = min(samples, value)
    return samples


def hashes_of_data(cfg: Config, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Hashes of the tokenizer and, by source, of its files' sizes and ends (4 KiB each): they tell another file."""
    files = {
        f"source {s.name}": [f"{path}{end}" for path in s.paths for end in (".idx", ".bin")] for s in cfg.data.sources
    }
    if tokenizer is not None:
        home = Path(tokenizer.path)
        files["tokenizer"] = [str(home / "tokenizer.json" if home.is_dir() else home)]
    return {name: _hash_of_ends(paths) for name, paths in files.items()}


def _hash_of_ends(paths: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for begin in (0, max(size - 4096, 0)):
                file.seek(begin)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _starting_point(cfg: Config, plan: Plan, tokenizer: Tokenizer) -> tuple[CheckpointReader | None, bool]:
    """The checkpoint to start from and whether it is this run's own; refuses one whose past this plan would change."""
    assert cfg.checkpoint.save is not None
    is_resume = (Path(cfg.checkpoint.save) / "latest").exists()
    if not is_resume and cfg.checkpoint.load is None:
        if any(Path(cfg.checkpoint.save).glob("step_*")):
            raise CheckpointError(
                f"{cfg.checkpoint.save}: has step folders but no `latest`; write the name of the one to go on from "
                "into it, or take another --run-dir"
            )
        return None, False
    reader = CheckpointReader.open(cfg.checkpoint.save if is_resume else str(cfg.checkpoint.load))
    if is_resume or not cfg.checkpoint.finetune:
        if "exp_avg.final_norm.weight" not in reader.records:
            raise CheckpointError(f"{reader.folder}: holds no optimizer state; load it with --finetune")
        was, now = reader.config.optimizer.optimizer, cfg.optimizer.optimizer
        if was != now:
            raise CheckpointError(
                f"{reader.folder}: holds the state of optimizer {was}, not of {now}; "
                f"go on with --optimizer {was}, or --load it with --finetune in another --run-dir"
            )
        if reader.state["plan_fingerprint"] != plan.fingerprint(int(reader.state["samples"])):
            raise CheckpointError(
                f"{reader.folder}: its {reader.state['samples']} samples came from another data plan (sources, tokens, "
                "stages, seed or block length changed); take another --run-dir, or --load it with --finetune"
            )
        theirs = reader.state.get("data")
        for name, mine in hashes_of_data(cfg, tokenizer).items():
            if isinstance(theirs, dict) and theirs.get(name, mine) != mine:
                raise CheckpointError(
                    f"{reader.folder}: {name} is another file now than when this checkpoint was made; "
                    "take another --run-dir, or --load it with --finetune"
                )
        were, are = (BatchSizes.of(t) for t in (reader.config.train, cfg.train))
        if were.history(reader.samples) != are.history(reader.samples):
            raise CheckpointError(
                f"{reader.folder}: its {reader.samples} samples came in batches of {were} (global_batch_size, "
                f"rampup_batch_size), not of {are}; a run keeps the batches of its past"
            )
    return reader, is_resume


def _check_writable(folder: str) -> None:
    """Refuse a directory that this process could not write into, before hours of training find out."""
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written: {existing} is no writable directory; give another place")


def prepare(cfg: Config, world_size: int, has_cuda: bool) -> Prepared:
    """Check everything that needs no process group; the same on every rank. Raises MegapolyErrors."""
    cfg = resolve(cfg, has_cuda)
    check(cfg, world_size)
    assert cfg.checkpoint.save is not None
    _check_writable(cfg.logging.run_dir)
    _check_writable(cfg.checkpoint.save)
    vocab_size, tokenizer = resolve_vocab_size(cfg)
    streams = open_sources(cfg, vocab_size)
    valid = [TokenStream(s.valid_paths, vocab_size) if s.valid_paths else None for s in cfg.data.sources]
    for stream in (*streams, *valid):
        if stream is not None:
            stream.check_vocab(vocab_size)
    plan = make_plan(cfg, [stream.num_tokens for stream in streams])
    num_samples = run_length(cfg, plan)
    checkpoint, is_resume = _starting_point(cfg, plan, tokenizer)
    if checkpoint is not None:
        check_same_model(checkpoint, cfg.model, vocab_size, parameter_shapes(cfg.model, vocab_size))
    infilling = make_infilling(cfg.data, tokenizer, cfg.train.seed)
    prepared = Prepared(cfg, tokenizer, vocab_size, streams, valid, plan, num_samples, checkpoint, is_resume, infilling)
    check_schedule(cfg.schedule, prepared.num_steps)
    return prepared
