"""The learning rate before, at and after each boundary."""

import math

import pytest

from megapoly.errors import ConfigError
from megapoly.optim.schedule import learning_rate
from megapoly.run_checks import check_schedule
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


def test_inverse_square_root_falls_from_the_peak_to_its_floor() -> None:
    cfg = ScheduleConfig(lr=1.0, min_lr=0.25, lr_warmup_iters=100, lr_decay_style="inverse-square-root")
    rates = [learning_rate(cfg, step, 3000) for step in (50, 99, 100, 101, 400, 1599, 1600, 1601, 3000)]
    assert rates == pytest.approx([0.5, 0.99, 1.0, (100 / 101) ** 0.5, 0.5, (100 / 1599) ** 0.5, *[0.25] * 3])
    assert learning_rate(ScheduleConfig(lr=1.0, lr_decay_style="inverse-square-root"), 4, 10) == 0.5  # no warm-up
    bounded = ScheduleConfig(lr=1.0, lr_decay_iters=16, lr_decay_style="inverse-square-root")
    assert [learning_rate(bounded, step, 100) for step in (16, 17)] == [0.25, 0.0]


# What is left of the way from lr to min_lr after a quarter and after half of the final decay.
WSD = {
    "linear": (0.75, 0.5),
    "cosine": (0.5 * (1 + math.cos(math.pi / 4)), 0.5),
    "minus_sqrt": (0.5, 1 - 0.5**0.5),
    "exponential": (2 * 0.5**0.25 - 1, 2 * 0.5**0.5 - 1),
}


@pytest.mark.parametrize("shape", WSD)
def test_wsd_warms_up_stays_and_decays(shape: str) -> None:
    cfg = ScheduleConfig(
        lr=1.0, min_lr=0.1, lr_warmup_iters=10, lr_decay_style="WSD", lr_wsd_decay_iters=20, lr_wsd_decay_style=shape
    )
    quarter, half = WSD[shape]
    expected = {9: 0.9, 10: 1.0, 11: 1.0, 79: 1.0, 80: 1.0, 85: 0.1 + 0.9 * quarter, 90: 0.1 + 0.9 * half, 100: 0.1}
    assert {step: learning_rate(cfg, step, 100) for step in expected} == pytest.approx(expected, abs=1e-12)
    assert 0.1 < learning_rate(cfg, 99, 100) < learning_rate(cfg, 81, 100) < 1.0
    assert learning_rate(cfg, 100, 100) == learning_rate(cfg, 101, 100) == 0.1


def test_a_longer_wsd_run_agrees_with_the_shorter_one_until_its_decay() -> None:
    cfg = ScheduleConfig(lr=1.0, lr_warmup_iters=10, lr_decay_style="WSD")  # a tenth of all steps
    assert [learning_rate(cfg, s, 100) for s in range(1, 91)] == [learning_rate(cfg, s, 300) for s in range(1, 91)]
    assert learning_rate(cfg, 91, 100) < 1.0 == learning_rate(cfg, 270, 300) > learning_rate(cfg, 271, 300)
    fixed = ScheduleConfig(lr=1.0, lr_decay_style="WSD", lr_decay_iters=100, lr_wsd_decay_iters=40)
    assert learning_rate(fixed, 60, 300) == 1.0 > learning_rate(fixed, 61, 300) > learning_rate(fixed, 100, 300) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warmup_init": 2.0}, r"lr_warmup_init \(2.0\) must not exceed lr \(1.0\)"),
        ({"lr_warmup_iters": 50, "lr_decay_iters": 50}, r"lr_decay_iters \(50\) must exceed lr_warmup_iters \(50\)"),
        (
            {"lr_decay_style": "WSD", "lr_warmup_iters": 30, "lr_wsd_decay_iters": 71},
            r"lr_wsd_decay_iters \(71\) \+ .* \(30\) must not exceed the run's steps \(100\); at most 70",
        ),
        ({"lr_decay_style": "WSD", "lr_warmup_iters": 95}, r"lr_wsd_decay_iters \(10\) .* at most 5 steps of decay"),
        ({"lr_decay_style": "WSD", "lr_decay_iters": 9, "lr_wsd_decay_iters": 10}, r"lr_decay_iters \(9\); at most 9"),
    ],
)
def test_phases_that_overlap_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_schedule(ScheduleConfig(lr=1.0, **options), 100)


def test_phases_that_touch_and_runs_that_end_in_warm_up_are_accepted() -> None:
    check_schedule(ScheduleConfig(lr_decay_style="WSD", lr_warmup_iters=30, lr_wsd_decay_iters=70), 100)
    check_schedule(ScheduleConfig(lr_decay_style="WSD", lr_warmup_iters=300, lr_wsd_decay_iters=70), 100)
    check_schedule(ScheduleConfig(lr_warmup_iters=300), 100)
