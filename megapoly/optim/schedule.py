"""The learning rate as a pure function of the step."""

import math

from megapoly.sections import ScheduleConfig


def learning_rate(cfg: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step, counted from 1, of a run of total_steps.

    Linear warm-up from lr_warmup_init reaches lr at step lr_warmup_iters; then cosine (Loshchilov and Hutter 2017,
    arXiv 1608.03983) or linear decay reaches min_lr at step lr_decay_iters (default: the last), and stays there.
    """
    if step <= cfg.lr_warmup_iters:
        return cfg.lr_warmup_init + (cfg.lr - cfg.lr_warmup_init) * step / cfg.lr_warmup_iters
    if cfg.lr_decay_style == "constant":
        return cfg.lr
    last = cfg.lr_decay_iters or total_steps
    if step >= last:
        return cfg.min_lr
    progress = (step - cfg.lr_warmup_iters) / (last - cfg.lr_warmup_iters)
    factor = 1.0 - progress if cfg.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * factor
