"""Checks of numbers, batches and learning rates: what a run says of them, or a stage of its own."""

import math
import os

from megapoly.errors import ConfigError
from megapoly.sections import CheckpointConfig, ResilienceConfig, ScheduleConfig, TrainConfig


def positive(**values: int | float | None) -> None:
    """Refuse what is not above 0 and finite; None is left out."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} ({value}) must be positive")


def bounded(most: int, **values: int | None) -> None:
    """Refuse what is beyond `most`."""
    for name, value in values.items():
        if value is not None and value > most:
            raise ConfigError(f"{name} ({value}) is beyond {most:,}: surely a slip")


def multiples(value: int, unit: int) -> str:
    """The multiples of unit next to a value, in words."""
    return " or ".join(str(n) for n in (value // unit * unit, -(-value // unit) * unit) if n)


def check_batches(t: TrainConfig, dp: int) -> None:
    """Refuse global batches that cannot be dealt out evenly, those of a ramp-up included."""
    unit, end = t.micro_batch_size * dp, t.global_batch_size
    product = f"micro_batch_size ({t.micro_batch_size}) x data-parallel size ({dp}) = {unit}"
    if end % unit:
        raise ConfigError(f"global_batch_size ({end}) must be a multiple of {product}, such as {multiples(end, unit)}")
    check_ramp(t, unit)
    if t.rampup_batch_size is None:
        return
    start, increment, samples = t.rampup_batch_size
    if uneven := [size for size in range(start, end, increment) if size % unit]:
        shown = ", ".join(map(str, uneven[:8])) + (", .." if len(uneven) > 8 else "")
        raise ConfigError(
            f"rampup_batch_size {start},{increment},{samples} has batches of {shown}, no multiples of {product}; "
            f"{_nearest_ramp(start, increment, samples, end, unit)}"
        )


def check_ramp(t: TrainConfig, unit: int = 1) -> None:
    """Refuse a ramp-up that does not lead to global_batch_size; batches should be multiples of unit."""
    if t.rampup_batch_size is None:
        return
    if len(t.rampup_batch_size) != 3 or min(t.rampup_batch_size) < 1:
        raise ConfigError(f"rampup_batch_size {t.rampup_batch_size} must be start,increment,samples, each at least 1")
    (start, increment, samples), end = t.rampup_batch_size, t.global_batch_size
    if start >= end or (end - start) % increment:
        raise ConfigError(
            f"rampup_batch_size must go from start ({start}) to global_batch_size ({end}) by whole "
            f"increments ({increment}); {_nearest_ramp(start, increment, samples, end, unit)}"
        )


def _nearest_ramp(start: int, increment: int, samples: int, end: int, unit: int) -> str:
    """The ramp to `end` nearest to the one asked for whose batches are all multiples of unit, in words."""
    if end <= unit:
        return f"batches of {end} leave no room for a ramp"
    start = min(max(round(start / unit), 1), end // unit - 1) * unit
    whole = (step for step in range(unit, end - start + 1, unit) if (end - start) % step == 0)
    return f"the nearest that works is {start},{min(whole, key=lambda step: abs(step - increment))},{samples}"


def at_least_zero(name: str, value: float) -> None:
    """Refuse what is negative or not finite."""
    if value < 0 or not math.isfinite(value):
        raise ConfigError(f"{name} ({value}) must be a finite number of at least 0")


def check_rates(s: ScheduleConfig) -> None:
    """Refuse learning rates and warm-ups that are no numbers of at least 0, and a floor above the peak."""
    for name in ("lr", "min_lr", "lr_warmup_iters", "lr_warmup_init"):
        at_least_zero(name, getattr(s, name))
    if s.min_lr > s.lr:
        raise ConfigError(f"min_lr ({s.min_lr}) must not exceed lr ({s.lr})")


def wsd_decay_steps(s: ScheduleConfig, total_steps: int) -> int:
    """Steps of WSD's final decay: as configured, else a tenth of lr_decay_iters, at least one."""
    return s.lr_wsd_decay_iters or max((s.lr_decay_iters or total_steps) // 10, 1)


def check_schedule(s: ScheduleConfig, total_steps: int) -> None:
    """Refuse phases of the learning rate that overlap; total_steps is the run's last step."""
    if s.lr_warmup_init > s.lr:
        raise ConfigError(f"lr_warmup_init ({s.lr_warmup_init}) must not exceed lr ({s.lr})")
    decays = s.lr_decay_style not in ("constant", "inverse-square-root")
    if decays and s.lr_decay_iters is not None and s.lr_decay_iters <= s.lr_warmup_iters:
        raise ConfigError(f"lr_decay_iters ({s.lr_decay_iters}) must exceed lr_warmup_iters ({s.lr_warmup_iters})")
    last, stretch = s.lr_decay_iters or total_steps, wsd_decay_steps(s, total_steps)
    if s.lr_decay_style == "WSD" and s.lr_warmup_iters < last < s.lr_warmup_iters + stretch:
        where = "lr_decay_iters" if s.lr_decay_iters else "the run's steps"
        raise ConfigError(
            f"lr_wsd_decay_iters ({stretch}) + lr_warmup_iters ({s.lr_warmup_iters}) must not exceed {where} ({last}); "
            f"at most {last - s.lr_warmup_iters} steps of decay fit"
        )


def check_checkpoints(c: CheckpointConfig, save_interval: int) -> None:
    """Refuse policies that keep nothing, or that ask for what is never saved."""
    positive(most_recent_k=c.most_recent_k, save_retain_interval=c.save_retain_interval,
              max_failed_saves=c.max_failed_saves)  # fmt: skip
    at_least_zero("max_save_minutes", c.max_save_minutes)
    for step in c.save_steps:
        positive(save_steps=step)
    if c.save_copy is not None and c.save is not None and os.path.realpath(c.save_copy) == os.path.realpath(c.save):
        raise ConfigError(f"save_copy ({c.save_copy}) is the directory of save: give another place, or leave it out")
    every = c.save_retain_interval
    if every is not None and save_interval and every % save_interval:
        raise ConfigError(
            f"save_retain_interval ({every}) must be a multiple of save_interval ({save_interval}), such as "
            f"{multiples(every, save_interval)}: only those steps are saved"
        )
    if c.finetune and c.load is None:
        raise ConfigError("finetune needs load: the checkpoint whose weights to take")


def check_resilience(r: ResilienceConfig) -> None:
    """Refuse windows and numbers of steps that cannot be meant."""
    positive(spike_threshold=r.spike_threshold, rollback_batches=r.rollback_batches)
    for name in ("max_skipped_steps", "rollback_steps", "max_rollbacks"):
        at_least_zero(name, getattr(r, name))
    if not 4 <= r.spike_window <= 10_000:
        raise ConfigError(f"spike_window ({r.spike_window}) must lie between 4 and 10,000 steps")
