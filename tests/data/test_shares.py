"""Shares of a stage: each way means what its source says, ramps are exact staircases, nothing passes an epoch cap."""

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_curriculum import CODE, DIAL, EN, KO, OPUS, plan_of

from megapoly.data.plan_report import describe, summary
from megapoly.data.ramp import Ramp
from megapoly.data.shares import fill
from megapoly.errors import ConfigError, DataError

DE = {"name": "web-de", "language": "de"}
STAGE = {"name": "one", "tokens": 100_000}
RAMP = {"from": 0.3, "to": 0.6}


def shares(stage: dict[str, Any], sources: list[dict[str, Any]], tokens: list[int] | None = None) -> list[Fraction]:
    return list(plan_of(sources, [STAGE | stage], tokens).stages[0].shares)


# ------------------------------------------------------------------------------------------------ constant shares


def test_language_weights_are_dealt_to_the_sources_of_a_language_by_their_weights() -> None:
    found = shares({"language_weights": {"en": 6, "ko": 4}, "code_share": 0.2}, [EN, KO, OPUS, CODE, DE])
    # 20% code; of the other 80%, 40% Korean, three parts web to one of OPUS; German is not named.
    assert found == [Fraction(x) for x in ("0.48", "0.24", "0.08", "0.2", "0")]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_alpha_is_xlm_rs_exponent_over_the_tokens_of_a_language(alpha: float) -> None:
    tokens = [70_000, 20_000, 10_000, 500, 3_000]
    en, ko, opus, code, de = map(float, shares({"alpha": alpha}, [EN, KO, OPUS, CODE, DE], tokens))
    powers = {"en": 70_000**alpha, "ko": 30_000**alpha, "de": 3_000**alpha}
    assert [en, ko + opus, de] == pytest.approx([power / sum(powers.values()) for power in powers.values()], rel=1e-9)
    assert ko == pytest.approx(3 * opus) and code == 0  # by weight, not by tokens


def test_alpha_one_is_exact_and_a_temperature_is_its_inverse() -> None:
    tokens = [700 * 101, 300 * 101]
    assert shares({"alpha": 1.0}, [EN, KO], tokens) == [Fraction(7, 10), Fraction(3, 10)]
    assert shares({"temperature": 4.0}, [EN, KO], tokens) == shares({"alpha": 0.25}, [EN, KO], tokens)
    assert shares({"temperature": 1.0}, [EN, KO], tokens) == [Fraction(7, 10), Fraction(3, 10)]


def unimax_of_the_paper(tokens: list[int], budget: float, cap: float) -> list[float]:
    """Algorithm 1 of Chung et al. 2023, as printed: smallest language first."""
    given = [0.0] * len(tokens)
    for place, i in enumerate(order := sorted(range(len(tokens)), key=lambda i: tokens[i])):
        fair = budget / (len(order) - place)
        given[i] = min(fair, tokens[i] * cap)
        budget -= given[i]
    return given


@given(st.lists(st.integers(5_001, 10**6), min_size=2, max_size=6), st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=50, deadline=None)
def test_unimax_is_the_papers_and_no_source_is_read_a_sample_more_than_its_cap(tokens: list[int], cap: float) -> None:
    codes = ["en", "ko", "de", "fr", "ja", "zh"][: len(tokens)]
    sources = [{"name": code, "language": code} for code in codes]
    room = sum(max(cap * ((n - 1) // 100) - 2, 0) for n in tokens)
    plan = plan_of(sources, [STAGE | {"tokens": max(int(room * 0.8), 1) * 100, "unimax": cap}], tokens)
    expected = unimax_of_the_paper([(n - 1) // 100 for n in tokens], plan.num_samples, cap)
    for share, samples, wanted in zip(
        plan.stages[0].shares, plan.sampler().counts(plan.num_samples), expected, strict=True
    ):
        assert float(share) * plan.num_samples == pytest.approx(wanted, abs=2 * len(tokens))
        assert abs(samples - wanted) <= 2 * len(tokens) + 2
    for source, count in zip(plan.sources, plan.sampler().counts(plan.num_samples), strict=True):
        assert count <= cap * source.slices


def test_unimax_counts_what_earlier_stages_read_and_splits_a_language_within_its_caps() -> None:
    small = OPUS | {"weight": 3.0}
    stages = [STAGE | {"tokens": 60_000, "weights": {"web-en": 1.0}}, STAGE | {"name": "two", "unimax": 2.0}]
    plan = plan_of([EN, KO, small], stages, [50_050, 80_050, 10_050])
    en, ko, opus = plan.stages[1].shares
    # English has 2 x 500 - 600 epochs' slices left, OPUS 2 x 100: the rest of the 1,000 samples is Korean web.
    assert [float(share) * 1000 for share in (en, ko, opus)] == pytest.approx([398, 404, 198])
    assert plan.sampler().counts(plan.num_samples)[0] <= 1000


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), min_size=1, max_size=8), st.integers(0, 300))
@settings(deadline=None)
def test_filling_is_max_min_fair(items: list[tuple[int, int]], total: int) -> None:
    weights, rooms = ([Fraction(item[i]) for item in items] for i in (0, 1))
    found = fill(Fraction(total), weights, rooms)
    assert sum(found) == min(total, sum(room for weight, room in zip(weights, rooms, strict=True) if weight))
    assert all(0 <= x <= room for x, room in zip(found, rooms, strict=True))
    level = max((x / w for x, w, room in zip(found, weights, rooms, strict=True) if w), default=Fraction(0))
    for x, w, room in zip(found, weights, rooms, strict=True):
        assert not w or x == room or x / w == level  # who has less than the others has all that there is


# ------------------------------------------------------------------------------------------------ ramps


@given(
    st.fractions(0, 1, max_denominator=100), st.fractions(0, 1, max_denominator=100),
    st.sampled_from(["linear", "cosine"]), st.integers(1, 10**7),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_step_of_a_staircase_has_the_mean_of_the_ramp(begin: Fraction, end: Fraction, shape: str, n: int) -> None:
    stairs = Ramp(begin, end, shape).staircase(n)
    assert sum(samples for samples, _ in stairs) == n and min(samples for samples, _ in stairs) > 0
    # No finer than changes a sample, no coarser than a hundredth.
    assert len(stairs) == min(100, max(1, math.isqrt(int(n * abs(end - begin)))))
    assert abs(sum(samples * share for samples, share in stairs) / n - (begin + end) / 2) < Fraction(1, 10**15)
    seen = 0
    for samples, share in stairs:
        a, b = seen / n, (seen + samples) / n
        if shape == "linear":
            part = (a + b) / 2
        else:
            part = 0.5 - (math.sin(math.pi * b) - math.sin(math.pi * a)) / (2 * math.pi * (b - a))
        assert float(share) == pytest.approx(float(begin + (end - begin) * Fraction(part)), abs=1e-9)
        seen += samples
    moves = [float(b - a) * float(end - begin) for (_, a), (_, b) in itertools.pairwise(stairs)]
    assert min(moves, default=0) >= 0


def test_steps_go_from_one_end_to_the_other_in_equal_stretches() -> None:
    stairs = Ramp(Fraction("0.3"), Fraction("0.6"), "steps", 4).staircase(1001)
    assert [share for _, share in stairs] == [Fraction(x) for x in ("0.3", "0.4", "0.5", "0.6")]
    assert {samples for samples, _ in stairs} == {250, 251}
    assert len(Ramp(Fraction(0), Fraction(1), "linear", 7).staircase(10**6)) == 7


@given(st.sampled_from(["linear", "cosine", "steps"]), st.integers(10, 3000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_at_every_prefix_of_a_ramp_each_source_is_within_two_samples(shape: str, samples: int, falls: bool) -> None:
    ramp = {"from": 0.6, "to": 0.1} if falls else {"from": 0.05, "to": 0.9}
    dial = {"non_english_share": ramp | {"shape": shape} | ({"steps": 5} if shape == "steps" else {})}
    stages = [DIAL, STAGE | dial | {"name": "ramp", "tokens": samples * 100, "code_share": 0.1}, DIAL | {"name": "3"}]
    plan = plan_of([EN, KO, OPUS, CODE], stages)
    sampler = plan.sampler()
    for n in {*range(0, plan.num_samples, 13), *(end for _, end, _ in plan.stages[1].stretches())}:
        for count, quota in zip(sampler.counts(n), sampler.quotas(n), strict=True):
            assert abs(count - quota) <= 2
    assert sum(step.samples for step in plan.stages[1].steps) == samples
    first, last = (plan.non_english_share(plan.stages[1].steps[i].shares) for i in (0, -1))
    assert (first > last) == falls
    assert {step.shares[3] for step in plan.stages[1].steps} == {Fraction("0.1")}


def test_a_ramp_is_one_stage_for_whoever_reads() -> None:
    plan = plan_of([EN, KO], [DIAL, STAGE | {"name": "two", "non_english_share": RAMP}])
    assert [stage.name for stage in plan.stages] == ["one", "two"]
    assert len(plan.stages[1].steps) == 17 and plan.stage_at(1999) == 1
    assert plan.stages[1].shares[1] == Fraction("0.45")
    shown = summary(plan)["stages"][1]
    assert shown["ramp"]["steps"] == 17 and 0.3 < shown["ramp"]["first"] < 0.32 and 0.58 < shown["ramp"]["last"] < 0.6
    assert abs(shown["deviation_in_samples"]["non-English"]) <= 2
    text = describe(plan)
    assert "a ramp in 17 steps, non-English 30.87% to 59.11%" in text
    assert text.count("samples 1,000 to 2,000") == 1


@given(st.integers(0, 1998), st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_planned_shares_are_the_difference_of_quotas(begin: int, length: int) -> None:
    plan = plan_of([EN, KO], [DIAL, STAGE | {"name": "two", "non_english_share": RAMP}])
    end = min(begin + length, 2000)
    quotas = plan.sampler().quotas
    expected = [float(b - a) / (end - begin) for a, b in zip(quotas(begin), quotas(end), strict=True)]
    assert plan.planned_shares(begin, end) == pytest.approx(expected, abs=1e-9)


def test_a_ramp_made_longer_changes_its_past_and_one_appended_does_not() -> None:
    two = STAGE | {"name": "two", "non_english_share": RAMP}
    plan, longer = (plan_of([EN, KO], [DIAL, two | {"tokens": n}]) for n in (100_000, 150_000))
    appended = plan_of([EN, KO], [DIAL, two, DIAL | {"name": "three"}])
    assert plan.fingerprint(1000) == longer.fingerprint(1000) and plan.fingerprint(1900) != longer.fingerprint(1900)
    assert plan.fingerprint() == appended.fingerprint(plan.num_samples)


# ------------------------------------------------------------------------------------------------ refusals

ALL = {"web-en": 1.0}
REFUSALS: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
    ([EN, KO], {"alpha": 0.3, "unimax": 1.0}, "gives alpha and unimax: one of them"),
    ([EN, KO], {"weights": ALL, "language_weights": {"en": 1}}, "gives weights and language_weights: one"),
    ([EN, KO], {"language_weights": {"en": 1, "kr": 1}}, "language_weights name an unknown language 'kr'; known: en, ko"),
    ([EN, KO, CODE], {"language_weights": {"en": 1, "code": 1}}, "'code', which is no language; give code_share"),
    ([EN, KO], {"language_weights": {"en": 0}}, "language weights add up to 0"),
    ([EN, KO | {"weight": 0.0}], {"language_weights": {"ko": 1}}, "all ko sources have weight 0"),
    ([EN, KO], {"alpha": 3.3}, r"alpha \(3.3\) must lie .* written temperature: 3.3"),
    ([EN, KO], {"alpha": -1.0}, r"alpha \(-1\) must lie between 0"),
    ([EN, KO], {"temperature": 0.3}, r"temperature \(0.3\) is 1 / alpha, at least 1 .* written alpha: 0.3"),
    ([EN, KO], {"temperature": 0.0}, r"temperature \(0\) is 1 / alpha, at least 1"),
    ([EN, KO], {"unimax": 0.0}, r"unimax \(0\) is the most epochs"),
    ([EN, KO], {"unimax": 0.9}, "unimax 0.9 leaves 89,600 tokens to read, the stage wants 100,000"),
    ([EN, KO], {"alpha": 0.3, "code_share": 0.1}, r"code_share \(0.1\) needs a source that is code"),
    ([EN, KO], {"non_english_share": {"from": 0.3}}, "'to' is missing; a ramp is"),
    ([EN, KO], {"non_english_share": {"from": "a", "to": 1}}, "'from' must be a number, not 'a'"),
    ([EN, KO], {"non_english_share": {"from": 0.3, "to": 1.6}}, r"non_english_share: to \(1.6\) must lie between 0 and 1"),
    ([EN, KO], {"non_english_share": {"from": 0.3, "to": 60}}, r"to \(60\) must lie .*; 60 per cent is written 0.6"),
    ([EN, KO], {"non_english_share": 30.0}, r"non_english_share \(30\) must .*; 30 per cent is written 0.3$"),
    ([EN, KO], {"non_english_share": 1.5}, r"non_english_share \(1.5\) must lie between 0 and 1$"),
    ([EN, KO], {"non_english_share": RAMP | {"shape": "lienar"}}, "shape 'lienar' is unknown; did you mean 'linear'"),
    ([EN, KO], {"non_english_share": RAMP | {"form": "linear"}}, "unknown key 'form'"),
    ([EN, KO], {"non_english_share": RAMP | {"shape": "steps"}}, "shape steps needs 'steps'"),
    ([EN, KO], {"non_english_share": RAMP | {"shape": "steps", "steps": 1}}, "steps .1. must lie between 2"),
    ([EN, KO], {"non_english_share": RAMP | {"steps": 2.5}}, "steps .2.5. must be a whole number"),
    ([EN, KO], {"non_english_share": RAMP | {"steps": "x"}}, "steps .x. must be a whole number"),
    ([KO], {"non_english_share": RAMP}, "needs a source that is English"),
]  # fmt: skip


@pytest.mark.parametrize(("sources", "stage", "message"), REFUSALS)
def test_shares_that_cannot_be_meant_are_refused(
    sources: list[dict[str, Any]], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(sources, [STAGE | stage])
    assert "stage 'one'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", [{"alpha": 0.3}, {"unimax": 2.0}, {"non_english_share": RAMP}])
def test_an_empty_source_is_refused_with_its_tokens(stage: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="'web-ko' has 0 tokens, too few for one slice of 100"):
        plan_of([EN, KO], [STAGE | stage], [500_000, 0])
    assert shares({"alpha": 0.3}, [EN, KO | {"weight": 0.0}], [500_000, 0]) == [1, 0]


def test_all_sources_over_the_cap_are_named_with_their_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"'web-en' .* 1.4 epochs \(700 .* of 500.*'web-ko' .* 1.2 .* max_epochs \(1\)"
    ):
        plan_of([EN, KO], [DIAL], [50_050, 25_050], max_epochs=1.0)
