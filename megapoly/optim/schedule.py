"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable

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


def wsd_decay_steps(cfg: ScheduleConfig, total_steps: int) -> int:
    """Steps of WSD's final decay: as configured, else a tenth of lr_decay_iters, at least one."""
    return cfg.lr_wsd_decay_iters or max((cfg.lr_decay_iters or total_steps) // 10, 1)
