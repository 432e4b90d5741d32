"""The extension in C++: the bits of the twin at any size, nothing that crashes it, and a twin that serves without it."""

import contextlib
import copy
import itertools
import threading
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from data_orders import Recipe, recipes, sampler_of
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import native, sampler
from megapoly.data.native import NATIVE
from megapoly.data.permutation import permute
from megapoly.data.sampler import MOST, Sampler, StageTarget

BUILT = pytest.mark.skipif(NATIVE.module is None, reason=NATIVE.reason)
POLYLM = [400, 120, 80, 60, 50, 50, 40, 40, 30, 30, 20, 20, 20, 10, 10, 10, 5, 5]


def assert_equal(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype == np.int64 and mine.tolist() == theirs.tolist()


# ----------------------------------------------------------------------------------------------------- the same bits


@BUILT
@settings(max_examples=100, deadline=None)
@given(recipes(), st.data())
def test_both_forms_give_the_same_samples(recipe: Recipe, data: st.DataObject) -> None:
    ours, twin = sampler_of(recipe, native=True), sampler_of(recipe, native=False)
    assert (ours.implementation, twin.implementation) == ("C++", "numpy")
    assert_equal(ours.samples(0, ours.num_samples), twin.samples(0, ours.num_samples))
    begin = data.draw(st.integers(0, ours.num_samples))
    end = data.draw(st.integers(begin, ours.num_samples))
    for one in (ours, twin):
        assert_equal(one.samples(begin, end), ours.samples_at(range(begin, end)))
    numbers = data.draw(st.lists(st.integers(0, ours.num_samples - 1), max_size=40))
    for one in (ours, twin):
        columns = one.samples_at(numbers)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == [one.sample(n) for n in numbers]
    for n in (begin, end):
        assert ours.counts(n) == twin.counts(n)


@BUILT
@settings(max_examples=60, deadline=None)
@given(recipes(min_stages=2, longest=2**60 // 5, most_slices=2**60), st.data())
def test_plans_of_up_to_two_to_the_sixty_samples_are_exact(recipe: Recipe, data: st.DataObject) -> None:
    ours, twin = sampler_of(recipe, native=True), sampler_of(recipe, native=False)
    last = ours.num_samples - 1
    borders = [begin for begin, *_ in np.cumsum([[0], *([n] for n, _ in recipe[1])], axis=0).tolist()]
    near = [n for border in borders for n in (border - 1, border, border + 1, border + 4095, border + 4096)]
    numbers = [n for n in near if 0 <= n <= last] + data.draw(st.lists(st.integers(0, last), min_size=1, max_size=20))
    columns = ours.samples_at(numbers)
    assert_equal(columns, twin.samples_at(numbers))
    for i, n in enumerate(numbers):
        assert ours.sample(n) == tuple(int(column[i]) for column in columns)
        counts, after = ours.counts(n), ours.counts(n + 1)
        assert sum(after) == n + 1 and after[columns[0][i]] == counts[columns[0][i]] + 1
        # A ratio is rounded to 2^-62 at each of its tree's splits.
        for count, quota in zip(counts, ours.quotas(n), strict=True):
            assert abs(count - quota) <= 2 + Fraction(8 * n, 2**62)


@BUILT
@settings(max_examples=20, deadline=None)
@given(recipes(min_stages=2, longest=200), st.integers(10**12, 2 * 10**12), st.integers(1, 10**6))
def test_at_a_trillion_samples_every_epoch_is_still_a_permutation_and_shares_are_exact(
    recipe: Recipe, far: int, begin: int
) -> None:
    slices, stages, seed = recipe
    ours = sampler_of((slices, [(far, stages[0][1]), *stages], seed), native=True)
    first = far - begin % 500
    sources, epochs, offsets = ours.samples(first, ours.num_samples)
    for n in range(first, ours.num_samples + 1, 97):
        assert max(abs(c - q) for c, q in zip(ours.counts(n), ours.quotas(n), strict=True)) <= 2
    for source, size in enumerate(slices):
        for epoch in np.unique(epochs[sources == source])[1:-1]:
            chunk = offsets[(sources == source) & (epochs == epoch)]
            assert sorted(chunk.tolist()) == list(range(size))


@BUILT
@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 2**31, 10**12 + 39, 2**60 - 1, 2**60])
def test_permutations_of_every_size_are_the_twins(size: int) -> None:
    ours = Sampler([size], [StageTarget(min(3 * size, MOST), (Fraction(1),))], 5, native=True)
    numbers = range(ours.num_samples) if size < 200 else [*range(50), size - 1, ours.num_samples - 1]
    _, epochs, offsets = ours.samples_at(list(numbers))
    assert [(0, e, o) for e, o in zip(epochs.tolist(), offsets.tolist(), strict=True)] == [
        ours.sample(n) for n in numbers
    ]
    if size < 200:
        assert all(sorted(offsets[i * size : i * size + size].tolist()) == list(range(size)) for i in range(3))
    assert permute(0, size, 7) in range(size)


@BUILT
def test_many_small_stages_are_the_twins_and_open_at_once() -> None:
    rng = np.random.default_rng(1)
    stages = [(int(rng.integers(1, 6000)), rng.integers(1, 10**6, 100).tolist()) for _ in range(300)]
    recipe = ([1000] * 100, stages, 9)
    twin = sampler_of(recipe, native=False)
    start = time.process_time()
    ours = Sampler(twin.slices, twin.targets, 9, native=True)
    ours.samples(0, 1)
    seconds = time.process_time() - start
    for begin in (0, ours.num_samples // 2, ours.num_samples - 20_000):
        assert_equal(ours.samples(begin, begin + 20_000), twin.samples(begin, begin + 20_000))
    assert seconds < 1


@BUILT
def test_a_sample_of_a_batch_takes_less_than_a_microsecond() -> None:
    ours = sampler_of(([12345] * 18, [(10**12, POLYLM), (10**12, POLYLM[::-1])], 3), native=True)
    ours.samples(0, 1)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        ours.samples(10**12 - 50_000, 10**12 + 50_000)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 100_000 * 1e-6


@BUILT
def test_other_threads_run_meanwhile() -> None:
    ours = sampler_of(([12345] * 18, [(10**9, POLYLM)], 3), native=True)
    ours.samples(0, 1)
    busy = threading.Thread(target=ours.samples, args=(0, 4_000_000))
    turns = [time.perf_counter()]
    busy.start()
    while busy.is_alive():
        turns.append(time.perf_counter())
    # A call that kept the lock would be one long gap between two turns of this thread.
    assert max(after - before for before, after in itertools.pairwise(turns)) < (turns[-1] - turns[0]) / 2


# ------------------------------------------------------------------------------------------------- nothing crashes it


TABLES = {
    "samples": 90,
    "slices": np.array([5, 7, 3]),
    "keys": np.array([1, 2, 3], np.uint64),
    "served": np.array([20, 10, 0]),
    "root": 1,
    "lefts": np.array([-1, 0], np.int32),
    "rights": np.array([-2, -3], np.int32),
    "ratios": np.array([2**61, 2**60], np.uint64),
    "wholes": np.array([-1, 1]),
    "parts": np.array([2**61, 5], np.uint64),
    "opening_sources": np.array([0, 1, 2, 0]),
    "opening_ordinals": np.array([0, 0, 0, 1]),
}


def use(tables: dict[str, Any]) -> None:
    """Samples of the tables; what comes out names a source and one of its slices."""
    stage = NATIVE.module.Stage(**tables)  # type: ignore[union-attr]
    assert 0 <= tables["samples"] <= MOST
    numbers = np.array([tables["samples"] * i // 200 for i in range(200)])
    slices = np.asarray(tables["slices"])
    for sources, epochs, offsets in (
        stage.samples_at(numbers[: tables["samples"]]),
        stage.samples(0, min(tables["samples"], 200)),
    ):
        assert ((sources >= 0) & (sources < len(slices))).all() and (epochs >= 0).all()
        assert ((offsets >= 0) & (offsets < slices[sources])).all()


@BUILT
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TABLES)), st.data())
def test_no_table_can_crash_it(name: str, data: st.DataObject) -> None:
    use(TABLES)
    table = np.atleast_1d(TABLES[name])
    info = np.iinfo(np.int32 if name == "root" else table.dtype)
    edges = [0, 1, -1, 2, 3, 4, 2**31 - 1, 2**60, 2**60 + 1, 2**62, 2**63 - 1, 2**64 - 1, info.min, info.max]
    values = st.sampled_from([edge for edge in edges if info.min <= edge <= info.max]) | st.integers(-5, 5).filter(
        lambda value: value >= info.min
    )
    altered: Any
    if isinstance(TABLES[name], int):
        altered = data.draw(values)
    elif data.draw(st.booleans()):
        altered = table.copy()
        altered[data.draw(st.integers(0, len(table) - 1))] = data.draw(values)
    else:
        altered = np.array(data.draw(st.lists(values, max_size=len(table) + 2)), table.dtype)
    with contextlib.suppress(ValueError):
        use(TABLES | {name: altered})


@BUILT
def test_what_is_out_of_range_is_refused_by_the_extension_itself() -> None:
    order = NATIVE.module.Stage(**TABLES)  # type: ignore[union-attr]
    for begin, end in ((-1, 3), (3, 2), (0, 91), (91, 91), (2**62, 2**62 + 1)):
        with pytest.raises(IndexError, match="outside"):
            order.samples(begin, end)
    for numbers in ([-1], [90], [0, 2**63 - 1], [-(2**63)]):
        with pytest.raises(IndexError, match="outside"):
            order.samples_at(np.array(numbers))
    with pytest.raises(ValueError, match="one dimension"):
        order.samples_at(np.zeros((2, 2), np.int64))
    for wrong in ({"slices": np.zeros((2, 2))}, {"root": 2}, {"lefts": np.array([-1, 1])}, {"root": -4}):
        with pytest.raises(ValueError, match="dimension|children|source"):
            NATIVE.module.Stage(**TABLES | wrong)  # type: ignore[union-attr]
    for begin, end in ((2**63, 2**63), (-(2**63) - 1, 0), ("0", 1), (0.5, 1)):
        with pytest.raises(TypeError):
            order.samples(begin, end)


@BUILT
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 3), max_size=4), st.integers(-3, 2**21))
def test_no_opening_can_crash_it(rows: list[tuple[int, int, int]], steps: int) -> None:
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    try:
        sources, _ = NATIVE.module.largest_deficit_first(*columns, steps)  # type: ignore[union-attr]
    except ValueError:
        return
    assert len(sources) == steps and ((sources >= 0) & (sources < len(rows))).all()


# ------------------------------------------------------------------------------------------------ both, or one alone


@pytest.mark.parametrize("is_native", [pytest.param(True, marks=BUILT), False])
def test_numbers_of_any_kind_are_taken_or_refused(is_native: bool) -> None:
    one = sampler_of(([3, 4], [(10, [1, 2]), (10, [2, 1])], 0), is_native)
    expected = one.samples(3, 7)
    for numbers in ([3, 4, 5, 6], (3, 4, 5, 6), np.array([3, 4, 5, 6], np.uint8), np.arange(0, 40)[3:7]):
        assert_equal(one.samples_at(numbers), expected)
    assert_equal(one.samples_at(np.arange(40)[12:4:-2]), one.samples_at([12, 10, 8, 6]))
    assert_equal(one.samples(np.int64(3), np.int64(7)), expected)
    assert_equal(one.samples_at([]), one.samples(20, 20))
    for numbers in ([-1], [20], np.array([2**64 - 1], np.uint64)):
        with pytest.raises(IndexError, match="20 samples"):
            one.samples_at(numbers)
    for wrong in ([0.5], [[1, 2]], ["1"], [None], 3):
        with pytest.raises(TypeError, match="flat array of integers"):
            one.samples_at(wrong)  # type: ignore[arg-type]
    for slices, samples in ((MOST + 1, 5), (5, MOST + 1)):
        with pytest.raises(ValueError, match=r"2\^60"):
            Sampler([slices], [StageTarget(samples, (Fraction(1),))], 0, is_native)


def test_without_the_extension_numpy_serves_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Recipe = ([50, 7], [(40, [7, 2]), (60, [3, 7])], 1)
    expected = sampler_of(recipe).samples(0, 100)
    absent = native.load("megapoly.data.no_such_extension")
    assert absent.module is None and "pip install" in absent.reason
    monkeypatch.setattr(sampler, "NATIVE", absent)
    alone = sampler_of(recipe)
    assert alone.implementation == "numpy" and alone.describe().startswith("data order: numpy, the same but slower")
    assert absent.reason in alone.describe() and "\n" not in alone.describe()
    assert_equal(alone.samples(0, 100), expected)
    with pytest.raises(ImportError, match="no_such_extension"):
        sampler_of(recipe, native=True)


def test_an_extension_of_other_sources_is_not_called() -> None:
    outdated = native.load("json")
    assert outdated.module is None and "interface None" in outdated.reason and "pip install" in outdated.reason


@pytest.mark.parametrize("is_native", [pytest.param(True, marks=BUILT), False])
def test_a_sampler_can_be_copied_to_another_process(is_native: bool) -> None:
    one = sampler_of(([50, 7], [(40, [7, 2]), (60, [3, 7])], 1), is_native)
    expected = one.samples(0, 100)
    other = copy.deepcopy(one)
    assert other.implementation == one.implementation
    assert_equal(other.samples(0, 100), expected)
