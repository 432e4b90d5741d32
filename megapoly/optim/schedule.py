"""The learning rate as a pure function of the step."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megapoly.errors import ConfigError
from megapoly.run_checks import check_rates, check_schedule, wsd_decay_steps
from megapoly.sections import ScheduleConfig

# From the part of a decay that is done, in (0, 1], to the part of the way from min_lr to lr that is left. Cosine:
# Loshchilov and Hutter 2017, arXiv 1608.03983; minus_sqrt: Hägele et al. 2024, arXiv 2405.18392; exponential:
# Megatron-LM's halving in the spirit of Hu et al. 2024, brought to 0 at its end.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
}


def learning_rate(cfg: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step, counted from 1, of a run of total_steps; the definitions are Megatron-LM's.

    Linear warm-up from lr_warmup_init reaches lr at step lr_warmup_iters. Then cosine or linear decay reaches min_lr
    at step lr_decay_iters (default: the last), and stays there. WSD (Hu et al. 2024, arXiv 2404.06395) stays at lr and
    decays in the lr_wsd_decay_iters steps before that. inverse-square-root (Vaswani et al. 2017, arXiv 1706.03762)
    falls as lr x sqrt(warm-up / step), not below min_lr, and is at min_lr after step lr_decay_iters.
    """
    if step <= cfg.lr_warmup_iters:
        return cfg.lr_warmup_init + (cfg.lr - cfg.lr_warmup_init) * step / cfg.lr_warmup_iters
    if cfg.lr_decay_style == "constant":
        return cfg.lr
    last = cfg.lr_decay_iters or total_steps
    if step > last:
        return cfg.min_lr
    if cfg.lr_decay_style == "inverse-square-root":
        return max(cfg.min_lr, cfg.lr * math.sqrt(max(cfg.lr_warmup_iters, 1) / step))
    start, shape = cfg.lr_warmup_iters, cfg.lr_decay_style
    if cfg.lr_decay_style == "WSD":
        start, shape = last - wsd_decay_steps(cfg, total_steps), cfg.lr_wsd_decay_style
        if step <= start:
            return cfg.lr
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * SHAPES[shape]((step - start) / (last - start))


# ------------------------------------------------------------------------------------------------ by stages


@dataclass(frozen=True)
class Phase:
    """A stretch of `num_steps` steps from first_step on with a schedule that counts its steps from 1.

    `stage` is the stage that began it with a rate of its own; None for the run's schedule as it is.
    """

    first_step: int
    num_steps: int
    schedule: ScheduleConfig
    stage: str | None = None

    def rate(self, step: int) -> float:
        """Learning rate of a step of the run."""
        return learning_rate(self.schedule, step - self.first_step + 1, self.num_steps)


RATE_KEYS = tuple(field.name for field in dataclasses.fields(ScheduleConfig) if field.name != "lr_decay_iters")


def phases_of(
    schedule: ScheduleConfig, stages: Sequence[tuple[str, int, Mapping[str, Any]]], num_steps: int
) -> list[Phase]:
    """The schedules of a run of num_steps steps; `stages` are (name, first step, settings) in their order.

    The first stage's settings stand in place of the configured ones. A later stage that gives any begins a schedule of
    its own, up to the next that does: what it leaves out is as configured, but that it has no warm-up unless it gives
    one, which then starts from the rate reached before (Ibrahim et al. 2024, arXiv 2403.08763, warm up again and decay
    again). A stage that gives none goes on with the schedule that runs.
    """
    own = [(name, first, {key: given[key] for key in RATE_KEYS if key in given}) for name, first, given in stages]
    begins: list[tuple[str | None, int, dict[str, Any]]] = [(None, 1, own[0][2] if own else {})]
    begins += [(name, first, given) for name, first, given in own[1:] if given and first <= num_steps]
    phases: list[Phase] = []
    for number, (name, first, given) in enumerate(begins):
        last = begins[number + 1][1] - 1 if number + 1 < len(begins) else num_steps
        if last < first and number:
            continue  # a stage of less than a batch
        made = dataclasses.replace(schedule, **given)
        if phases:
            reached = phases[-1].rate(first - 1)
            warmup = {"lr_warmup_iters": 0, "lr_warmup_init": reached, "lr_decay_iters": None} | given
            made = dataclasses.replace(schedule, **warmup)
        phases.append(Phase(first, last - first + 1, made, name))
    return phases


def check_phases(phases: Sequence[Phase]) -> None:
    """Refuse schedules that cannot be; ConfigError names the stage."""
    for phase in phases:
        try:
            check_rates(phase.schedule)
            is_free = phase.stage is not None and phase.schedule.lr_warmup_init > phase.schedule.lr
            # From a higher rate a warm-up may well lead down.
            checked = dataclasses.replace(phase.schedule, lr_warmup_init=0.0) if is_free else phase.schedule
            check_schedule(checked, phase.num_steps)
        except ConfigError as error:
            raise ConfigError(f"stage '{phase.stage}': {error}" if phase.stage else str(error)) from None


def rate_at(phases: Sequence[Phase], step: int) -> float:
    """Learning rate of a step, counted from 1."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step or phase is phases[0]).rate(step)
