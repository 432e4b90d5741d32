"""Batch-size ramp-up: Megatron-LM's sizes, the same samples in the same order, exact at every border."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import VOCAB, tiny_config

from megapoly.checks import check_batches
from megapoly.data.batch_sizes import BatchSizes, Change
from megapoly.data.curriculum import make_plan, open_sources
from megapoly.data.loader import Deal, TrainLoader
from megapoly.errors import ConfigError
from megapoly.sections import TrainConfig


def walked(sizes: BatchSizes, steps: int, first: int = 0) -> list[int]:
    """Samples after each of so many steps, step by step: a batch ends where sequences change their length."""
    cuts = [change.begin for change in sizes.changes if change.cuts]

    def after(seen: int, _: int) -> int:
        return min([seen + sizes.at(seen), *(cut for cut in cuts if cut > seen)])

    return list(itertools.accumulate(range(steps), after, initial=first))


def test_sizes_grow_in_equal_stretches_of_samples() -> None:
    sizes = BatchSizes(final=16, start=4, increment=4, ramp_samples=100)  # three stretches of 33 1/3 samples
    assert [sizes.at(s) for s in (0, 33, 34, 66, 67, 99, 100, 10**9)] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert list(sizes.stretches()) == [(0, 4, 9), (36, 8, 4), (68, 12, 3), (104, 16, None)]
    assert [sizes.samples_after(n) for n in (0, 8, 9, 10, 13, 14, 16, 17, 18)] == [0, 32, 36, 44, 68, 80, 104, 120, 136]
    assert list(BatchSizes.of(TrainConfig(global_batch_size=16)).stretches(5)) == [(5, 16, None)]


def test_batches_change_with_stages_and_end_where_sequences_change() -> None:
    sizes = BatchSizes(8, 8, changes=(Change(20, 4), Change(30, 6, cuts=True), Change(31, 6, cuts=True)))
    # 0 8 16 | 24 28 | 30 | 31 37 ..: a batch of 8 reaches into the second stage, none across 30 and 31.
    assert walked(sizes, 8) == [0, 8, 16, 24, 28, 30, 31, 37, 43]
    assert [sizes.samples_after(n) for n in range(9)] == walked(sizes, 8)
    assert [sizes.steps_until(n) for n in (16, 17, 24, 25, 29, 30, 31, 32)] == [2, 3, 3, 4, 5, 5, 6, 7]
    assert sizes.history(28) == [(0, 8), (24, 4)] and sizes.history(29) == sizes.history(28)


def sizes_of(ramp: tuple[int, int, int, int], gaps: list[tuple[int, int, bool]]) -> BatchSizes:
    start, increment, number, samples = ramp
    begins = itertools.accumulate((gap for gap, _, _ in gaps), initial=samples)
    changes = tuple(Change(begin, size, cuts) for begin, (_, size, cuts) in zip(begins, gaps, strict=False))
    return BatchSizes(start + increment * number, start, increment, samples, changes)


ramps = st.builds(
    sizes_of,
    st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 5), st.integers(1, 200)),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.booleans()), max_size=4),
)


@given(ramps, st.integers(0, 300), st.integers(0, 60))
@settings(deadline=None)
def test_closed_forms_equal_walking_step_by_step(sizes: BatchSizes, first: int, steps: int) -> None:
    seen = walked(sizes, 60, first)
    assert sizes.samples_after(steps, first) == seen[steps]
    assert sizes.steps_until(seen[steps], first) == steps
    assert sizes.steps_until(seen[steps] + 1, first) == steps + 1
    between = seen[steps // 2]  # going on from anywhere is the same run
    assert sizes.samples_after(steps - steps // 2, between) == seen[steps]
    if not sizes.changes:
        assert set(np.diff(seen)) <= set(range(sizes.start, sizes.final + 1, sizes.increment))
    assert sizes.end(seen[steps]) == walked(sizes, 1, seen[steps])[1]


@given(ramps, ramps, st.integers(1, 300))
@settings(deadline=None)
def test_histories_are_equal_where_all_past_batches_are(a: BatchSizes, b: BatchSizes, samples: int) -> None:
    past = [[s for s in walked(sizes, 300) if s < samples] for sizes in (a, b)]
    batches = [[(s, sizes.at(s)) for s in seen] for sizes, seen in zip((a, b), past, strict=True)]
    if a.history(samples) == b.history(samples):
        assert batches[0] == batches[1]
    elif not a.changes + b.changes:
        assert batches[0] != batches[1]


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ([2, 2, 100], r"2,2,100 has batches of 2, 6, no multiples of micro_batch_size \(1\) x data-parallel size \(4\) = 4; "
                      r"the nearest that works is 4,4,100"),
        ([4, 3, 100], r"from start \(4\) to global_batch_size \(8\) by whole increments \(3\); the nearest .* 4,4,100"),
        ([8, 4, 100], r"from start \(8\) to global_batch_size \(8\) .* the nearest that works is 4,4,100"),
        ([4, 4], r"\[4, 4\] must be start,increment,samples"),
        ([4, 0, 100], "each at least 1"),
    ],
)  # fmt: skip
def test_ramps_that_cannot_be_dealt_out_are_refused(ramp: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_batches(TrainConfig(global_batch_size=8, rampup_batch_size=ramp), dp=4)
    check_batches(TrainConfig(global_batch_size=8, rampup_batch_size=[4, 4, 100]), dp=4)


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (2, 1), (1, 2)])
def test_a_ramp_leaves_the_samples_and_their_order(mbs: int, dp: int, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 20, rampup_batch_size=[2, 2, 30])
    streams = open_sources(cfg, VOCAB)
    plan = make_plan(cfg, [s.num_tokens for s in streams])
    sizes = BatchSizes.of(cfg.train)
    sources, _, offsets = plan.sampler().samples(0, plan.num_samples)
    seen = [s for s in walked(sizes, 30) if s < plan.num_samples] + [plan.num_samples]
    for first, end in itertools.pairwise(seen):
        rows: Counter[bytes] = Counter()
        for rank in range(dp):
            batches = TrainLoader(plan, streams, Deal(8, mbs, rank, dp), sizes).batch(first, end)
            assert len(batches) * mbs * dp == sizes.at(first)
            rows.update(
                row.tobytes() for b in batches for row, mask in zip(b.labels, b.mask, strict=True) if mask.any()
            )
        expected = (streams[sources[n]].read(offsets[n] * 16, offsets[n] * 16 + 17)[1:] for n in range(first, end))
        assert rows == Counter(piece.tobytes() for piece in expected)
