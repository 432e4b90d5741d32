"""The plans of the presets: the published shares by source and by language, and stages that a cluster can train."""

from fractions import Fraction

import pytest

from megapoly.checks import check
from megapoly.config import load_config
from megapoly.data.curriculum import Plan, make_plan

# PolyLM (arXiv 2307.06018): table 1, figure 5 (per cent of the tokens) and table 2 (per cent of the text).
STAGE_1 = {"mc4": 49.95, "cc100": 32.31, "pile": 16.41, "github": 1.17, "opus": 0.16}
STAGE_2 = {
    "cc100": 35.88, "wikipedia": 17.58, "arxiv": 14.79, "stackexchange": 12.31, "github": 7.76, "opus": 4.76,
    "books": 4.65, "mc4": 2.28,
}  # fmt: skip
LANGUAGES = {
    "en": 67.56, "zh": 22.14, "ru": 1.21, "es": 0.89, "de": 0.88, "fr": 0.81, "it": 0.69, "pt": 0.68, "ja": 0.67,
    "vi": 0.66, "id": 0.62, "pl": 0.61, "nl": 0.56, "ar": 0.55, "tr": 0.54, "th": 0.46, "he": 0.33, "ko": 0.13,
}  # fmt: skip


def plan_of(name: str) -> Plan:
    cfg = load_config(name)
    return make_plan(cfg, [10**13] * len(cfg.data.sources))


def summed(plan: Plan, stage: int, key: str, kinds: tuple[str, ...] = ("text", "parallel", "code")) -> dict[str, float]:
    """Shares of a stage in per cent by language, or by the first word of the source's name."""
    sums: dict[str, Fraction] = {}
    for source, share in zip(plan.sources, plan.stages[stage].shares, strict=True):
        if source.kind in kinds:
            group = source.language if key == "language" else source.name.split("-")[0]
            sums[group] = sums.get(group, Fraction(0)) + 100 * share
    return {group: float(share) for group, share in sums.items() if share}


@pytest.mark.parametrize("name", ["polylm-1.7b-sources", "polylm-13b-sources"])
def test_polylms_stages_have_both_tables(name: str) -> None:
    plan = plan_of(name)
    assert [stage.samples * 2048 for stage in plan.stages] == pytest.approx([638e9, 97e9], rel=1e-7)
    assert summed(plan, 0, "source") == pytest.approx(STAGE_1, rel=2e-4)
    assert summed(plan, 1, "source") == pytest.approx({k: v / 1.0001 for k, v in STAGE_2.items()}, rel=2e-4)
    text = summed(plan, 0, "language", kinds=("text",))
    total = sum(text.values())
    assert {k: 100 * v / total for k, v in text.items()} == pytest.approx(LANGUAGES, abs=0.006)
    assert plan.non_english_share(plan.stages[1].shares) == pytest.approx(0.6, abs=1e-4)
    assert {s.language for s in plan.sources if s.kind == "parallel"} == set(LANGUAGES) - {"en"}


@pytest.mark.parametrize("size", ["1.7b", "13b", "1.7b-rope", "13b-rope"])
def test_polylm_by_language_is_at_30_and_60_per_cent(size: str) -> None:
    plan = plan_of(f"polylm-{size}")
    assert [plan.non_english_share(stage.shares) for stage in plan.stages] == pytest.approx([0.3, 0.6])
    text = summed(plan, 0, "language")
    assert text["zh"] / text["ko"] == pytest.approx(139.29 / 0.84)


def test_gecko_and_polyglot_ko() -> None:
    gecko = plan_of("gecko-7b")
    assert [100 * float(share) for share in gecko.stages[0].shares] == pytest.approx([35, 28, 37])
    for size, tokens in (("1.3b", 213e9), ("3.8b", 219e9), ("5.8b", 172e9), ("12.8b", 167e9)):
        plan = plan_of(f"polyglot-ko-{size}")
        assert plan.num_samples * 2048 == pytest.approx(tokens, rel=1e-6) and plan.stages[0].shares == (1,)


def test_exaone_has_two_rounds_and_hyperclova_x_longer_sequences_at_the_end() -> None:
    exaone = plan_of("exaone-3-7.8b")
    assert [stage.samples * 4096 for stage in exaone.stages] == pytest.approx([6.5e12, 1.5e12])
    experts = [summed(exaone, stage, "source")["expert"] for stage in (0, 1)]
    assert experts == pytest.approx([10, 50])
    assert [exaone.non_english_share(stage.shares) for stage in exaone.stages] == pytest.approx([4 / 9, 4 / 9])
    clova = plan_of("hyperclova-x")
    assert clova.block_length == 32768 and [stage.seq_length for stage in clova.stages] == [4096, 32768]
    assert summed(clova, 0, "language")["ko"] == pytest.approx(34)
    cfg = load_config("hyperclova-x")
    assert (cfg.data.fim_rate, cfg.data.fim_spm_rate) == (0.5, 0.5)  # it learnt to fill in, either way
    assert check(cfg, 512) == 128
