"""A plan changed on the way: its past stays to the sample, without repeats and gaps, and every difference is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_curriculum import DIAL, EN, KO, OPUS, plan_of, tool

from megapoly.data.curriculum import Plan
from megapoly.data.indexed import IndexedDatasetWriter
from megapoly.data.plan_changes import plan_changes

EN_KO = [EN, KO | {"weight": 1.0}]
ONE = {"name": "one", "tokens": 2_000_000, "non_english_share": 0.3}
TWO = {"name": "two", "tokens": 2_000_000, "non_english_share": 0.6}
TOKENS = [62_000 * 100 + 1] * 2  # slices of 100 tokens


def read(plan: Plan, begin: int, end: int) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in plan.sampler().samples(begin, end)), strict=True))


def assert_no_repeats_no_gaps(plan: Plan, samples: list[tuple[int, int, int]]) -> None:
    """Of each source exactly the first slices of its order were read, each once."""
    for source, counted in enumerate(plan.sources):
        mine = [(epoch, offset) for number, epoch, offset in samples if number == source]
        assert len(set(mine)) == len(mine), "a slice was read twice in an epoch"
        alone = plan_of(
            EN_KO, [{"name": "x", "tokens": 100 * max(len(mine), 1), "weights": {counted.name: 1.0}}], TOKENS
        )
        assert mine == [(epoch, offset) for _, epoch, offset in read(alone, 0, len(mine))], "a slice was left out"


def test_stage_two_of_another_share_repeats_nothing_and_leaves_nothing_out() -> None:
    """Megatron-LM's two ways repeat 8,000 and 6,000 samples here, or never see 6,000: 62,000 a language, 20,000 a stage."""
    first = plan_of(EN_KO, [ONE], TOKENS)
    then = plan_of(EN_KO, [ONE, TWO], TOKENS)  # relaunched with a second stage
    seen = read(first, 0, 20_000) + read(then, 20_000, 40_000)
    assert_no_repeats_no_gaps(then, seen)
    counts = np.bincount([source for source, _, _ in seen[20_000:]])
    assert counts.tolist() == [8_000, 12_000] and np.bincount([s for s, _, _ in seen[:20_000]]).tolist() == [
        14_000,
        6_000,
    ]
    assert {epoch for _, epoch, _ in seen} == {0}


def test_the_files_and_the_tool_say_the_same_of_that_case(tmp_path: Path) -> None:
    """Two sources of 62,000 slices on disk; the plan of 30%, then that with 60% appended, listed by the tool."""
    for name in ("en", "ko"):
        with IndexedDatasetWriter(str(tmp_path / f"{name}_text_document"), 100) as writer:
            writer.add_document(np.arange(62_000 * 16 + 1) % 100)
            writer.finalize()
    sources = [{"name": name, "language": name} for name in ("en", "ko")]
    one, two = (stage | {"tokens": 20_000 * 16} for stage in (ONE, TWO))

    def listed(stages: list[dict[str, Any]], samples: str) -> dict[str, list[tuple[int, int]]]:
        tree = {"model": {"seq_length": 16}, "data": {"data_root": str(tmp_path), "sources": sources}}
        (tmp_path / "plan.yaml").write_text(json.dumps(tree | {"curriculum": {"stages": stages}}))
        done = tool(str(tmp_path / "plan.yaml"), "--samples", samples)
        assert done.returncode == 0, done.stderr
        found: dict[str, list[tuple[int, int]]] = {"en": [], "ko": []}
        for line in map(json.loads, done.stdout.splitlines()):
            found[line["source"]].append((line["epoch"], line["offset"]))
        return found

    first, then = listed([one], "0:20000"), listed([one, two], "20000:40000")
    for name, expected in (("en", (14_000, 8_000)), ("ko", (6_000, 12_000))):
        assert (len(first[name]), len(then[name])) == expected
        seen = first[name] + then[name]
        alone = {"name": "alone", "tokens": len(seen) * 16, "weights": {name: 1.0}}
        assert len(set(seen)) == len(seen), "repeats"
        assert listed([alone], ":")[name] == seen, "gaps"


@given(st.integers(1, 19_999), st.floats(0, 1), st.booleans())
@settings(max_examples=8, deadline=None)
def test_a_share_changed_in_midst_of_a_stage_repeats_nothing_and_leaves_nothing_out(
    stop: int, share: float, ramps: bool
) -> None:
    """As the refusal advises: the stage ends at what was seen, and another is appended."""
    first = plan_of(EN_KO, [ONE], TOKENS)
    dial: Any = {"from": 0.3, "to": share} if ramps else share
    rest = TWO | {"tokens": (20_000 - stop) * 100, "non_english_share": dial}
    then = plan_of(EN_KO, [ONE | {"tokens": stop * 100}, rest], TOKENS)
    assert then.fingerprint(stop) == first.fingerprint(stop)
    assert all(change.since >= stop for change in plan_changes(first, then) if change.decides)
    assert_no_repeats_no_gaps(then, read(first, 0, stop) + read(then, stop, 20_000))


def changes(*new: Any, tokens: list[int] | None = None, sources: Any = None, **leaves: Any) -> list[tuple[int, str]]:
    old = plan_of([EN, KO], [DIAL, DIAL | {"name": "two", "non_english_share": 0.6}])
    found = plan_changes(old, plan_of(sources or [EN, KO], list(new), tokens, **leaves))
    return [(change.since, str(change)) for change in found]


def test_differences_are_named_with_their_numbers_and_their_first_sample() -> None:
    two = DIAL | {"name": "two", "non_english_share": 0.6}
    assert changes(DIAL, two) == []
    assert changes(DIAL, two, seed=8) == [(0, "seed was 7 and is 8")]
    assert changes(DIAL, two | {"tokens": 150_000}) == [
        (2000, "stage 'two' had 100,000 tokens, to sample 2,000, and has 150,000, to sample 2,500")
    ]
    assert changes(DIAL | {"tokens": 90_000}, two) == [
        (900, "stage 'one' had 100,000 tokens, to sample 1,000, and has 90,000, to sample 900"),
        (900, "stage 'two' had 100,000 tokens, to sample 2,000, and has 100,000, to sample 1,900"),
    ]
    assert changes(DIAL, two | {"non_english_share": 0.5}) == [
        (1000, "stage 'two' had 0.6 non-English and has 0.5 (shares: 'web-en' 0.4 -> 0.5, 'web-ko' 0.6 -> 0.5)")
    ]
    assert changes(DIAL, two, DIAL | {"name": "three"}) == [
        (2000, "stage 'three' is new (100,000 tokens, non-English 0.3)")
    ]
    assert changes(DIAL) == [(1000, "stage 'two' is gone (100,000 tokens, non-English 0.6)")]
    assert changes(DIAL, two, tokens=[50_050, 60_000]) == [(0, "source 'web-ko' had 50,050 tokens and has 60,000")]
    assert changes(DIAL, two, sources=[EN, KO, OPUS | {"weight": 0.0}]) == [
        (2000, "source 'opus-ko' is new (50,050 tokens)")
    ]
    (since, text), *rest = changes(DIAL, two, sources=[KO, EN])
    assert since == 0 and text == "source number 1 was 'web-en' and is 'web-ko'" and rest
    assert changes(DIAL, two | {"lr": 3e-5, "global_batch_size": 4}) == [
        (1000, "stage 'two': lr was not given and is 3e-05"),
        (1000, "stage 'two': global_batch_size was not given and is 4"),
    ]


def test_a_ramp_of_another_length_differs_from_its_first_step_on() -> None:
    ramp = {"name": "two", "tokens": 100_000, "non_english_share": {"from": 0.3, "to": 0.6}}
    old, new = (plan_of([EN, KO], [DIAL, ramp | {"tokens": n}]) for n in (100_000, 120_000))
    found = {change.since: str(change) for change in plan_changes(old, new)}
    assert set(found) == {1000, 2000} and found[1000].startswith(
        "stage 'two' had 0.3087 to 0.5911 non-English over 100,000 tokens and has 0.3083 to 0.5916 over 120,000 tokens"
    )


def test_a_ramp_to_another_share_is_told_without_its_length() -> None:
    old, new = (
        plan_of([EN, KO], [DIAL | {"non_english_share": {"from": 0.3, "to": end}}]) for end in (0.6, 0.7)
    )  # fmt: skip
    (change,) = plan_changes(old, new)
    assert str(change).startswith("stage 'one' had 0.3087 to 0.5911 non-English and has 0.3")


plans = st.lists(
    st.tuples(st.integers(1, 30), st.sampled_from([0.2, 0.5, {"from": 0.1, "to": 0.9}])), min_size=1, max_size=4
)


@given(plans, plans, st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_what_the_differences_leave_alone_is_the_same_to_the_sample(a: Any, b: Any, seen: int) -> None:
    """The fingerprint and the differences agree on whether a past is the same, and the samples are."""
    old, new = (
        plan_of([EN, KO], [DIAL | {"name": str(i), "tokens": 100 * n, "non_english_share": dial}
                           for i, (n, dial) in enumerate(stages)])
        for stages in (a, b)
    )  # fmt: skip
    is_same = all(change.since >= seen for change in plan_changes(old, new) if change.decides)
    if is_same:
        end = min(seen, old.num_samples, new.num_samples)
        assert old.fingerprint(end) == new.fingerprint(end)
        assert read(old, 0, end) == read(new, 0, end)
    elif seen <= min(old.num_samples, new.num_samples):
        assert old.fingerprint(seen) != new.fingerprint(seen)
