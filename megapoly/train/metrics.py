"""Records of a run: metrics.jsonl (one object a step), TensorBoard, and the line a person reads."""

import dataclasses
import errno
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megapoly.data.sources import language_of
from megapoly.errors import ConfigError
from megapoly.log import Console
from megapoly.model.count import flops_per_token
from megapoly.train.rows import RowFile, drop_rows_after
from megapoly.train.setup import Run
from megapoly.train.step import StepStats

# Dense bf16 peaks of the vendors' data sheets, TFLOP/s, by a part of the device's name.
PEAK_TFLOPS = {"A100": 312.0, "A800": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "H800": 989.0}


def peak_tflops(run: Run) -> float | None:
    """Peak of one device: as configured, else by the GPU's name, else unknown."""
    if run.cfg.logging.peak_tflops is not None or run.mesh.device.type != "cuda":
        return run.cfg.logging.peak_tflops
    name = torch.cuda.get_device_name(run.mesh.device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def by_group(groups: dict[str, str], losses: dict[str, float], tokens: dict[str, int]) -> dict[str, float]:
    """Mean token losses of groups of sources (name -> group), of those that had a token."""
    members: dict[str, list[str]] = {}
    for name in losses:
        members.setdefault(groups[name], []).append(name)
    return {group: mean(losses, tokens, names) for group, names in members.items()}


def sums_of(groups: dict[str, str], values: Mapping[str, float]) -> dict[str, float]:
    """Sums over groups of sources (name -> group)."""
    sums: dict[str, float] = {}
    for name, value in values.items():
        sums[groups[name]] = sums.get(groups[name], 0) + value
    return sums


def rounded(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares with six digits: a row a step stays short."""
    return {name: round(share, 6) for name, share in shares.items()}


def mean(losses: dict[str, float], tokens: dict[str, int], names: list[str]) -> float:
    """Mean token loss over some sources, NaN where they had no token."""
    count = sum(tokens.get(name, 0) for name in names)
    return sum(losses[name] * tokens[name] for name in names if name in losses) / count if count else math.nan


class Metrics:
    """Collects steps without waiting for the device, and writes them when asked to; files on the main rank only."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names = [source.name for source in run.cfg.data.sources]
        self.non_english = [s.name for s in run.cfg.data.sources if s.is_non_english]
        self.english = [s.name for s in run.cfg.data.sources if s.language == "en" and s.kind != "code"]
        self.language = {source.name: language_of(source) for source in run.cfg.data.sources}
        lengths = {stage.seq_length for stage in run.prepared.plan.stages}
        models = {length: dataclasses.replace(run.cfg.model, seq_length=length) for length in lengths}
        self.flops = {length: flops_per_token(model, run.prepared.vocab_size) for length, model in models.items()}
        self.peak = peak_tflops(run)
        self._pending: list[tuple[int, StepStats | None]] = []
        self._rows: list[dict[str, Any]] = []
        self._clock = time.perf_counter()
        self._file: RowFile | None = None
        self._board: Any = None
        if run.mesh.is_main:
            run_dir = Path(run.cfg.logging.run_dir)
            try:
                self._open(run_dir)
            except OSError as error:
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                advice = "; make room there, then start again" if is_full else ""
                where = error.filename or run_dir
                raise ConfigError(f"{where}: cannot be written: {error.strerror}{advice}") from None

    def _open(self, run_dir: Path) -> None:
        cfg, start = self.run.cfg, self.run.prepared.start_step
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(cfg.to_yaml(), encoding="utf-8")
        rows = run_dir / "metrics.jsonl"
        if damaged := drop_rows_after(rows, start):
            self.run.console.say(f"warning: {rows}: {damaged:,} damaged lines were dropped")
        self._file = RowFile(rows)
        if cfg.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)

    def start_clock(self) -> None:
        """Begin to count the time of the steps that follow."""
        self._clock = time.perf_counter()

    def add(self, step: int, stats: StepStats) -> None:
        """Keep a step's statistics on the device."""
        self._pending.append((step, stats))

    def leave_out(self, step: int) -> None:
        """Keep a place for a step whose batch is left out."""
        self._pending.append((step, None))

    def read(self) -> dict[str, Any]:
        """Read the pending steps from the device; returns the last one's row, which may still be added to.

        The last one was trained.
        """
        values = {
            step: (s.by_source.tolist(), s.grad_norm.item(), s.params_norm.item(), s.lr)
            for step, s in self._pending
            if s is not None
        }
        seconds = (time.perf_counter() - self._clock) / len(values)
        self._rows = [
            self._row(step, *values[step], seconds) if step in values else self._place(step) | {"left_out": True}
            for step, _ in self._pending
        ]
        self.run.watch.settle()
        for row in self._rows:
            if (note := self.run.watch.notes.pop(row["step"], None)) is not None:
                row["trouble"] = note
        if self.run.cfg.precision.fp16:
            trained = [(row, s) for row, (_, s) in zip(self._rows, self._pending, strict=True) if s is not None]
            for row, s in trained:
                row |= {"loss_scale": s.loss_scale, "skipped_steps": s.skipped_steps}
        self._pending.clear()
        return self._rows[-1]

    def write(self) -> None:
        """Write the rows that were read; those that a full disk does not take are written once it does."""
        if self._file is not None:
            waited = self._file.num_waiting
            try:
                self._file.write(self._rows)
            except OSError as error:
                if not waited:
                    self._warn(f"metrics.jsonl cannot be written ({error.strerror}); its rows are kept in memory")
        if self._board is not None:
            try:
                for row in self._rows:
                    self._write_board(row)
            except OSError as error:
                self._board = None
                self._warn(
                    f"TensorBoard's files cannot be written ({error.strerror}); it gets nothing more until a restart"
                )
        self._rows = []

    def _warn(self, text: str) -> None:
        self.run.console.say(f"  warning: {text}")

    def by_source(self, sums_and_counts: list[list[float]]) -> tuple[dict[str, float], dict[str, int]]:
        """(mean loss, tokens) of each source that had any, from fp64 [2, sources]."""
        triples = [(n, s, c) for n, s, c in zip(self.names, *sums_and_counts, strict=True) if c]
        return {n: s / c for n, s, c in triples}, {n: int(c) for n, s, c in triples}

    def validation(self, sums_and_counts: list[list[float]]) -> dict[str, Any]:
        """The held-out losses as entries of a row."""
        losses, tokens = self.by_source(sums_and_counts)
        return {
            "valid_loss": mean(losses, tokens, self.names),
            "valid_loss_english": mean(losses, tokens, self.english),
            "valid_loss_non_english": mean(losses, tokens, self.non_english),
            "valid_loss_by_source": losses,
        }

    def _place(self, step: int) -> dict[str, Any]:
        """Where a step is in the run."""
        prepared = self.run.prepared
        samples, plan = prepared.samples_after(step), prepared.plan
        stage = plan.stages[plan.stage_at(prepared.samples_after(step - 1))].name
        return {"step": step, "samples": samples, "tokens": samples * plan.block_length, "stage": stage}

    def _row(
        self, step: int, by_source: list[list[float]], grad_norm: float, params_norm: float, lr: float, seconds: float
    ) -> dict[str, Any]:
        prepared = self.run.prepared
        losses, tokens = self.by_source(by_source)
        total = sum(tokens.values())
        begin, samples = prepared.samples_after(step - 1), prepared.samples_after(step)
        stage = prepared.plan.stages[prepared.plan.stage_at(begin)]
        planned = dict(zip(self.names, prepared.plan.planned_shares(begin, samples), strict=True))
        planned = {name: share for name, share in planned.items() if share}
        realised = {name: count / total for name, count in tokens.items()}
        tflops = (
            self.flops[stage.seq_length] * total / seconds / self.run.mesh.world.size / 1e12 if seconds else math.nan
        )
        return self._place(step) | {
            "loss": mean(losses, tokens, self.names),
            "loss_english": mean(losses, tokens, self.english),
            "loss_non_english": mean(losses, tokens, self.non_english),
            "loss_by_source": losses,
            "loss_by_language": by_group(self.language, losses, tokens),
            "tokens_by_source": tokens,
            "planned_share_by_source": rounded(planned),
            "share_by_source": rounded(realised),
            "planned_share_by_language": rounded(sums_of(self.language, planned)),
            "share_by_language": rounded(sums_of(self.language, realised)),
            "non_english_share": prepared.plan.non_english_share([tokens.get(n, 0) for n in self.names]),
            "lr": lr,
            "grad_norm": grad_norm,
            "params_norm": params_norm,
            "seconds": seconds,
            "tokens_per_second": total / seconds if seconds else math.nan,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak if self.peak else None,
        }

    def _write_board(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            for part, number in value.items() if isinstance(value, dict) else ((None, value),):
                if isinstance(number, (int, float)) and key != "step":
                    self._board.add_scalar(key if part is None else f"{key}/{part}", number, row["step"])

    def close(self) -> None:
        """Finish the files; what metrics.jsonl has not taken by then is lost."""
        self.write()
        if self._file is not None:
            if self._file.num_waiting:
                self._warn(f"{self._file.num_waiting} rows of metrics.jsonl could not be written")
            self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._warn(f"TensorBoard's files cannot be finished ({error.strerror})")


def progress_line(run: Run, row: dict[str, Any], left: str) -> str:
    """One line on the state of the run; the share is that of the stage so far."""
    width = len(str(run.prepared.num_steps))
    plan = run.prepared.plan
    stage = plan.stages[plan.stage_at(row["samples"] - 1)]
    counts, before = plan.sampler().counts(row["samples"]), plan.sampler().counts(stage.begin_sample)
    share = plan.non_english_share(plan.text([now - then for now, then in zip(counts, before, strict=True)]))
    return (
        f"step {row['step']:>{width}}/{run.prepared.num_steps}  {stage.name}  loss {row['loss']:.3f} "
        f"(en {row['loss_english']:.3f}, other {row['loss_non_english']:.3f})  non-English {share:.1%} of stage  "
        f"lr {row['lr']:.2e}  grad {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tok/s"
        + (f"  MFU {row['mfu']:.1%}" if row["mfu"] else "")
        + f"  left {left}"
    )


def say_validation(console: Console, row: dict[str, Any]) -> None:
    """The held-out losses, by language."""
    parts = "  ".join(f"{name} {loss:.2f}" for name, loss in row["valid_loss_by_source"].items())
    console.say(
        f"  held-out loss {row['valid_loss']:.3f} (en {row['valid_loss_english']:.3f}, "
        f"other {row['valid_loss_non_english']:.3f}): {parts}"
    )
