"""The learning rate before, at and after each boundary."""

import math

import pytest

from megapoly.optim.schedule import learning_rate
from megapoly.sections import ScheduleConfig


def test_warm_up_begins_above_its_floor_and_reaches_the_peak() -> None:
    cfg = ScheduleConfig(lr=6e-5, min_lr=6e-6, lr_warmup_init=1e-7, lr_warmup_iters=2000)
    assert learning_rate(cfg, 1, 150_000) == pytest.approx(1e-7 + (6e-5 - 1e-7) / 2000)
    assert learning_rate(cfg, 1000, 150_000) == pytest.approx((6e-5 + 1e-7) / 2)
    assert learning_rate(cfg, 2000, 150_000) == pytest.approx(6e-5)
    assert learning_rate(cfg, 1999, 150_000) < 6e-5 > learning_rate(cfg, 2001, 150_000)


@pytest.mark.parametrize(("style", "middle"), [("cosine", 0.5 * (1 + math.cos(math.pi / 4))), ("linear", 0.75)])
def test_decay_ends_at_the_minimum_and_stays(style: str, middle: float) -> None:
    cfg = ScheduleConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10, lr_decay_iters=90, lr_decay_style=style)
    assert learning_rate(cfg, 30, 1000) == pytest.approx(0.1 + 0.9 * middle)
    assert learning_rate(cfg, 89, 1000) > 0.1
    assert [learning_rate(cfg, step, 1000) for step in (90, 91, 1000)] == [0.1] * 3


def test_decay_ends_with_the_run_by_default_and_constant_stays() -> None:
    assert learning_rate(ScheduleConfig(lr=1.0, min_lr=0.1), 50, 50) == 0.1
    assert learning_rate(ScheduleConfig(lr=1.0, lr_decay_style="constant", lr_warmup_iters=2), 50, 50) == 1.0
    assert learning_rate(ScheduleConfig(lr=1.0, min_lr=0.0), 1, 50) == pytest.approx(1.0, rel=2e-3)
