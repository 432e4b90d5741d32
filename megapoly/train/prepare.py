"""What is settled before any process group exists: every mistake that config and file headers can tell.

`prepare` gives the same on every rank of every host that sees the same files.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megapoly.checkpoint.folders import find_folders, roots_of, step_of
from megapoly.checkpoint.load import CheckpointReader, check_same_model, find_checkpoint
from megapoly.checkpoint.rollbacks import rollbacks_of
from megapoly.checks import block_length_of, check
from megapoly.data.batch_sizes import BatchSizes
from megapoly.data.curriculum import Plan, make_plan, open_sources, plan_for, united
from megapoly.data.indexed import TokenStream
from megapoly.data.infilling import Infilling, make_infilling
from megapoly.data.plan_changes import PlanChange, plan_changes
from megapoly.errors import CheckpointError, ConfigError, DamageError, MegapolyError
from megapoly.model.count import parameter_shapes
from megapoly.optim.schedule import Phase, check_phases, phases_of, rate_at
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
    changes: tuple[PlanChange, ...] = ()  # of the plan since that checkpoint, for what is to come
    skipped: Mapping[Path, str] = field(default_factory=dict)  # newer checkpoints that are damaged, and how
    data_hashes: Mapping[str, str] = field(default_factory=dict)  # as the files were at the start; see hashes_of_data

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

    @functools.cached_property
    def batch_sizes(self) -> BatchSizes:
        """Samples in each step."""
        return BatchSizes.of(self.cfg.train, self.plan)

    @functools.cached_property
    def first_steps(self) -> list[int]:
        """The first step of each stage: whose first sample is in it. Those that have begun are in the checkpoint."""
        seen, sizes = self.start_sample, self.batch_sizes
        known = (self.checkpoint.counts("first_steps") or []) if self.checkpoint and self.takes_full_state else []
        begins = [stage.begin_sample for stage in self.plan.stages[len(known) :]]
        return known[: len(self.plan.stages)] + [
            1 + (self.start_step + sizes.steps_until(begin, seen) if begin >= seen else sizes.steps_until(begin))
            for begin in begins
        ]

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The learning rate's schedules one after the other."""
        stages = zip(self.plan.stages, self.first_steps, strict=True)
        own = [(stage.name, first, stage.settings) for stage, first in stages]
        return phases_of(self.cfg.schedule, own, self.num_steps)

    @property
    def decay_end(self) -> int:
        """Step at which the decay of the run's first schedule ends."""
        return self.phases[0].schedule.lr_decay_iters or self.phases[0].num_steps

    @functools.cached_property
    def reset_steps(self) -> frozenset[int]:
        """Steps before which the optimizer begins anew."""
        stages = zip(self.plan.stages, self.first_steps, strict=True)
        firsts = [first for stage, first in stages if stage.settings.get("reset_optimizer")]
        return frozenset(next(step for step in itertools.count(first) if not self.leaves_out(step)) for first in firsts)

    def leaves_out(self, step: int) -> bool:
        """Whether nothing of a step's batch is trained on; not of one before start_step."""
        return step > self.start_step and self.plan.leaves_out(self.samples_after(step - 1), self.samples_after(step))

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        return rate_at(self.phases, step)

    def samples_after(self, step: int) -> int:
        """Samples seen after a step that is not before start_step."""
        return min(self.batch_sizes.samples_after(step - self.start_step, self.start_sample), self.num_samples)


def resolve(cfg: Config, has_cuda: bool) -> Config:
    """Fill in what depends on the machine: precision, log interval, directories, lengths."""
    run_dir = Path(cfg.logging.run_dir)
    is_on_gpu = has_cuda and cfg.parallel.distributed_backend != "gloo"
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, block_length=block_length_of(cfg)),
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
    sizes = BatchSizes.of(cfg.train, plan)
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


def own_checkpoints(cfg: Config) -> list[Path]:
    """What the run may resume from, in its directory and its second one, the preferred first."""
    folders = [folder for root in roots_of(cfg.checkpoint) for folder in find_folders(root)]
    return sorted(folders, key=lambda folder: -(step_of(folder) or 0))


def newest_sound(folders: Sequence[Path], skipped: Mapping[Path, str]) -> tuple[CheckpointReader, dict[Path, str]]:
    """The first that is not known to be damaged; and those before it, with what is wrong. CheckpointError if none."""
    found = dict(skipped)
    for folder in folders:
        if folder not in found:
            try:
                return CheckpointReader.at(folder), found
            except DamageError as error:
                found[folder] = str(error)
    raise CheckpointError(
        f"{folders[0].parent}: no checkpoint is whole: {'; '.join(found.values())}; "
        "bring one back from a copy, or begin anew in another --run-dir"
    )


def _starting_point(
    cfg: Config, skipped: Mapping[Path, str]
) -> tuple[CheckpointReader | None, bool, dict[Path, str]]:  # fmt: skip
    """The checkpoint to start from, whether it is this run's own, and what had to be skipped for it."""
    if folders := own_checkpoints(cfg):
        reader, found = newest_sound(folders, skipped)
        return reader, True, found
    return _loaded(cfg, skipped)


def _loaded(cfg: Config, skipped: Mapping[Path, str]) -> tuple[CheckpointReader | None, bool, dict[Path, str]]:
    """The same for a run that has saved nothing yet."""
    if cfg.checkpoint.load is None:
        return None, False, {}
    reader, found = newest_sound(find_folders(cfg.checkpoint.load) or [find_checkpoint(cfg.checkpoint.load)], skipped)
    return reader, False, found


def with_left_out(plan: Plan, reader: CheckpointReader, roots: Sequence[Path]) -> Plan:
    """The plan without what a checkpoint's leaves out, and what the run of these directories has rolled back from."""
    rollbacks = rollbacks_of(roots) if roots else []
    ranges = [*reader.left_out, *((rollback.begin, rollback.end) for rollback in rollbacks)]
    return dataclasses.replace(plan, left_out=united(ranges))


def _check_start(reader: CheckpointReader, cfg: Config, plan: Plan, hashes: Mapping[str, str]) -> None:
    """Refuse a checkpoint whose optimizer, data or batches are not this run's: what was must stay as it was."""
    if "exp_avg.final_norm.weight" not in reader.records:
        raise CheckpointError(f"{reader.folder}: holds no optimizer state; load it with --finetune")
    was, now = reader.config.optimizer.optimizer, cfg.optimizer.optimizer
    if was != now:
        raise CheckpointError(
            f"{reader.folder}: holds the state of optimizer {was}, not of {now}; "
            f"go on with --optimizer {was}, or --load it with --finetune in another --run-dir"
        )
    _check_past(reader, cfg, plan)
    theirs = reader.data_hashes
    for name, mine in hashes.items():
        if theirs.get(name, mine) != mine:
            raise CheckpointError(
                f"{reader.folder}: {name} is another file now than when this checkpoint was made; "
                "take another --run-dir, or --load it with --finetune"
            )
    old = _old_plan(reader)
    were, are = BatchSizes.of(reader.config.train, old), BatchSizes.of(cfg.train, plan if old else None)
    if were.history(reader.samples) != are.history(reader.samples):
        raise CheckpointError(
            f"{reader.folder}: its {reader.samples} samples came in batches of {were} (global_batch_size, "
            f"rampup_batch_size), not of {are}; a run keeps the batches of its past"
        )


def _old_plan(reader: CheckpointReader) -> Plan | None:
    """The plan that a checkpoint was made with; None where it does not say how many tokens its sources had."""
    tokens, rows = reader.counts("source_tokens"), reader.counts("source_rows")
    if tokens is None or {len(tokens), len(rows or tokens)} != {len(reader.config.data.sources)}:
        return None
    try:
        return dataclasses.replace(make_plan(reader.config, tokens, rows), left_out=reader.left_out)
    except MegapolyError as error:
        raise CheckpointError(f"{reader.folder / 'state.json'}: its data plan cannot be read: {error}") from None


def _changes_since(reader: CheckpointReader, plan: Plan) -> list[PlanChange]:
    old = _old_plan(reader)
    return [] if old is None else plan_changes(old, plan)


def _check_past(reader: CheckpointReader, cfg: Config, plan: Plan) -> None:
    """Refuse a plan that changes what the checkpoint has seen, with each difference: its past stays as it was."""
    seen = reader.samples
    past = [change for change in _changes_since(reader, plan) if change.since < seen and change.decides]
    if reader.state["plan_fingerprint"] == plan.fingerprint(seen) and not past:
        return
    differences = "; ".join(map(str, past)) or "sources, tokens, stages, seed or block length changed"
    advice = ""
    old = _old_plan(reader)
    if past and all(change.of_stage for change in past) and old and seen <= old.num_samples:
        stage = old.stages[old.stage_at(seen - 1)]
        done = sum(s.tokens for s in reader.config.curriculum.stages[: old.stages.index(stage)])
        advice = (
            f" (a change from here on: end stage '{stage.name}' at tokens {seen * old.block_length - done} and append "
            "a stage)"
        )
    raise CheckpointError(
        f"{reader.folder}: its {seen} samples came from another data plan: {differences}{advice}; "
        "change it back, take another --run-dir, or --load it with --finetune"
    )


def _check_writable(folder: str) -> None:
    """Refuse a directory that this process could not write into, before hours of training find out."""
    path = Path(folder).absolute()
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); give another place") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written: {existing} is no writable directory; give another place")


def prepare(cfg: Config, world_size: int, has_cuda: bool, writes: bool = True) -> Prepared:
    """Check everything that needs no process group; the same on every rank. Raises MegapolyErrors.

    `writes`: whether the run is to write to its directories; a replay does not.
    """
    cfg = resolve(cfg, has_cuda)
    check(cfg, world_size)
    for folder in (cfg.logging.run_dir, cfg.checkpoint.save, cfg.checkpoint.save_copy):
        if writes and folder is not None:
            _check_writable(folder)
    vocab_size, tokenizer = resolve_vocab_size(cfg)
    streams = open_sources(cfg, vocab_size)
    valid = [TokenStream(s.valid_paths, vocab_size) if s.valid_paths else None for s in cfg.data.sources]
    for stream in (*streams, *valid):
        if stream is not None:
            stream.check_vocab(vocab_size)
    plan = plan_for(cfg, streams)
    num_samples = run_length(cfg, plan)
    infilling = make_infilling(cfg.data, tokenizer, cfg.train.seed)
    hashes = hashes_of_data(cfg, tokenizer)
    prepared = Prepared(
        cfg, tokenizer, vocab_size, streams, valid, plan, num_samples, infilling=infilling, data_hashes=hashes
    )
    return with_start(prepared, {})


def with_start(prepared: Prepared, skipped: Mapping[Path, str]) -> Prepared:
    """The same with the checkpoint that the run starts from, if any; `skipped` are known to be damaged, and how."""
    return _starting_from(prepared, *_starting_point(prepared.cfg, skipped))


def as_begun(prepared: Prepared) -> Prepared:
    """The same as the run began, whatever it has saved since: from what `load` names, or from nothing."""
    begun = _starting_from(prepared, *_loaded(prepared.cfg, {}))
    return dataclasses.replace(begun, plan=prepared.plan, changes=())


def _starting_from(
    prepared: Prepared, checkpoint: CheckpointReader | None, is_resume: bool, skipped: Mapping[Path, str]
) -> Prepared:  # fmt: skip
    cfg = prepared.cfg
    prepared = dataclasses.replace(prepared, checkpoint=checkpoint, is_resume=is_resume, skipped=skipped)
    if checkpoint is not None and prepared.takes_full_state:
        plan = with_left_out(prepared.plan, checkpoint, roots_of(cfg.checkpoint) if is_resume else [])
        _check_start(checkpoint, cfg, plan, prepared.data_hashes)
        prepared = dataclasses.replace(prepared, plan=plan, changes=tuple(_changes_since(checkpoint, plan)))
    if checkpoint is not None:
        shapes = parameter_shapes(cfg.model, prepared.vocab_size)
        check_same_model(checkpoint, cfg.model, prepared.vocab_size, shapes)
    check_phases(prepared.phases)
    if prepared.num_steps > prepared.start_step and prepared.leaves_out(prepared.num_steps):
        raise ConfigError(
            f"the run would end in samples that a rollback leaves out ({prepared.plan.left_out}): "
            "make it longer or shorter (train_samples, train_iters, tokens of the stages)"
        )
    return prepared
