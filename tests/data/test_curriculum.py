"""The data plan: shares mean what they say, what cannot be served is refused in one line, and the tool shows it."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data.curriculum import Plan, make_plan, open_sources
from megapoly.data.indexed import IndexedDatasetWriter
from megapoly.data.plan_report import describe, summary
from megapoly.errors import ConfigError, DataError
from megapoly.sections import Config, CurriculumConfig, DataConfig, ModelConfig, Source, Stage, TrainConfig

ROOT = Path(__file__).parent.parent.parent
EN = {"name": "web-en", "language": "en"}
KO = {"name": "web-ko", "language": "ko", "weight": 3.0}
OPUS = {"name": "opus-ko", "language": "ko", "kind": "parallel"}
CODE = {"name": "github", "language": "en", "kind": "code"}
DIAL = {"name": "one", "tokens": 100_000, "non_english_share": 0.3}


def config(sources: list[dict[str, Any]], stages: list[dict[str, Any]], **leaves: Any) -> Config:
    return Config(
        model=ModelConfig(seq_length=100),
        data=DataConfig(sources=[Source(**source) for source in sources], block_length=leaves.get("block_length")),
        curriculum=CurriculumConfig(stages=[Stage(**stage) for stage in stages], max_epochs=leaves.get("max_epochs")),
        train=TrainConfig(seed=leaves.get("seed", 7)),
    )


def plan_of(
    sources: list[dict[str, Any]], stages: list[dict[str, Any]], tokens: list[int] | None = None, **leaves: Any
) -> Plan:
    return make_plan(config(sources, stages, **leaves), tokens or [50_050] * len(sources))


# ------------------------------------------------------------------------------------------------ what shares mean


def test_the_dial_splits_english_from_all_others_by_weight() -> None:
    plan = plan_of([EN, KO, OPUS, CODE], [DIAL | {"code_share": 0.2}])
    # 20% code; of the other 80%, 30% Korean, three parts web to one of OPUS.
    assert plan.stages[0].shares == tuple(map(Fraction, ("0.56", "0.18", "0.06", "0.2")))
    assert plan.non_english_share([560, 180, 60, 200]) == pytest.approx(0.3)
    assert plan.non_english_share([0, 0, 0, 5]) == 0


def test_parallel_text_counts_by_its_language_and_code_without_a_share_is_not_read() -> None:
    english_pairs = OPUS | {"name": "opus-en", "language": "en"}
    plan = plan_of([EN, english_pairs, KO, CODE], [DIAL])
    assert plan.stages[0].shares == tuple(map(Fraction, ("0.35", "0.35", "0.3", "0")))


def test_weights_are_normalised_over_all_sources_and_the_unnamed_get_nothing() -> None:
    plan = plan_of([EN, KO, OPUS, CODE], [{"name": "s", "tokens": 1000, "weights": {"web-en": 0.1, "github": 0.3}}])
    assert plan.stages[0].shares == (Fraction(1, 4), 0, 0, Fraction(3, 4))


def test_a_dial_at_its_end_needs_only_the_side_that_it_reads() -> None:
    assert plan_of([EN], [DIAL | {"non_english_share": 0.0}]).stages[0].shares == (1,)
    assert plan_of([KO], [DIAL | {"non_english_share": 1.0}]).stages[0].shares == (1,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(100, 5000), min_size=1, max_size=6))
def test_stages_end_at_the_ceiling_of_cumulative_tokens(budgets: list[int]) -> None:
    plan = plan_of([EN, KO], [DIAL | {"name": f"s{i}", "tokens": budget} for i, budget in enumerate(budgets)])
    for i, stage in enumerate(plan.stages):
        assert stage.end_sample == -(-sum(budgets[: i + 1]) // 100)
        assert plan.stage_at(stage.begin_sample) == plan.stage_at(stage.end_sample - 1) == i
    for outside in (-1, plan.num_samples):
        with pytest.raises(IndexError):
            plan.stage_at(outside)


@pytest.mark.parametrize(("tokens", "slices", "dropped"), [(101, 1, 0), (200, 1, 99), (201, 2, 0), (100, 0, 100)])
def test_a_slice_needs_one_token_more_than_its_length(tokens: int, slices: int, dropped: int) -> None:
    weights = {"name": "s", "tokens": 1000, "weights": {"web-en": 1.0}}
    source = plan_of([EN, KO], [weights], [5000, tokens]).sources[1]
    assert (source.slices, source.dropped_tokens) == (slices, dropped)


def test_the_realised_language_mix_of_each_stage_is_that_of_the_dial() -> None:
    stages = [DIAL, DIAL | {"name": "two", "non_english_share": 0.6}]
    plan = plan_of([EN, KO, OPUS], stages)
    sources = plan.sampler().samples(0, plan.num_samples)[0]
    for stage, dial in zip(plan.stages, (0.3, 0.6), strict=True):
        english = int((sources[stage.begin_sample : stage.end_sample] == 0).sum())
        assert abs(english - stage.samples * (1 - dial)) <= 2


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_covers_what_decides_the_order() -> None:
    plan = plan_of([EN, KO], [DIAL])
    others = [
        plan_of([EN, KO], [DIAL], seed=8),
        plan_of([EN, KO], [DIAL], [50_050, 50_051]),
        plan_of([EN, KO], [DIAL | {"non_english_share": 0.31}]),
        plan_of([EN, KO], [DIAL | {"tokens": 100_100}]),
        plan_of([EN, KO | {"name": "news-ko"}], [DIAL]),
    ]
    prints = [p.fingerprint() for p in (plan, *others)]
    assert len(set(prints)) == len(prints)
    assert plan.fingerprint() == plan_of([EN, KO], [DIAL | {"name": "renamed"}]).fingerprint()


def test_a_plan_made_longer_keeps_the_fingerprint_and_the_samples_of_its_past() -> None:
    plan = plan_of([EN, KO], [DIAL, DIAL | {"name": "two", "non_english_share": 0.6}])
    seen = plan.stages[1].begin_sample + 17
    longer = plan_of(
        [EN, KO], [DIAL, DIAL | {"name": "two", "tokens": 10**6, "non_english_share": 0.6}, DIAL | {"name": "3"}]
    )
    changed = plan_of([EN, KO], [DIAL, DIAL | {"name": "two", "non_english_share": 0.5}])
    assert longer.fingerprint(seen) == plan.fingerprint(seen) != changed.fingerprint(seen)
    assert changed.fingerprint(1000) == plan.fingerprint(1000)
    for before, after in zip(plan.sampler().samples(0, 2000), longer.sampler().samples(0, 2000), strict=True):
        assert np.array_equal(before, after)


# --------------------------------------------------------------------------------------------------------- refusals

W = {"name": "s", "tokens": 1000}
REFUSALS: list[tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any], str]] = [
    ([], [DIAL], {}, "data.sources is empty"),
    ([EN, KO], [], {}, "curriculum.stages is empty"),
    ([EN, KO], [W | {"weights": {"web-en": 1.0, "web-kr": 1.0}}], {}, "source 'web-kr'; did you mean 'web-ko'"),
    ([EN, KO], [W | {"weights": {"web-en": 1.0, "web-ko": -0.5}}], {}, r"weight of 'web-ko' \(-0.5\)"),
    ([EN, KO], [W | {"weights": {"web-en": float("inf")}}], {}, r"\(inf\)"),
    ([EN, KO], [W | {"weights": {"web-en": 0.0}}], {}, "add up to 0"),
    ([EN, KO], [W | {"weights": {}}], {}, "add up to 0"),
    ([EN, KO | {"weight": -1.0}], [DIAL], {}, r"source 'web-ko': weight \(-1\)"),
    ([EN, KO | {"weight": 0.0}], [DIAL], {}, "all non-English sources have weight 0"),
    ([EN, KO], [DIAL | {"non_english_share": 1.3}], {}, r"non_english_share \(1.3\) must lie between 0 and 1"),
    ([EN, KO, CODE], [DIAL | {"code_share": -0.1}], {}, r"code_share \(-0.1\) must lie between 0 and 1"),
    ([KO], [DIAL], {}, r"non_english_share \(0.3\) needs a source that is English, but no source is English"),
    ([EN, CODE], [DIAL], {}, "no source is non-English"),
    ([EN, KO], [DIAL | {"code_share": 0.1}], {}, r"code_share \(0.1\) needs a source that is code"),
    ([EN, KO], [W], {}, "gives no shares; give one of weights, language_weights"),
    ([EN, KO], [DIAL | {"weights": {"web-en": 1.0}}], {}, "gives weights and non_english_share"),
    ([EN, CODE], [W | {"weights": {"web-en": 1.0}, "code_share": 0.2}], {}, "gives weights and code_share"),
    ([EN, KO], [DIAL | {"tokens": 99}], {}, r"tokens \(99\) is less than one slice of 100"),
    ([EN, KO], [DIAL | {"tokens": 2**61}], {}, r"more than 2\^60 tokens"),
    ([EN, KO, KO], [DIAL], {}, "source 'web-ko' appears 2 times"),
    ([EN, KO], [DIAL, DIAL], {}, "stage 'one' appears 2 times"),
    ([EN, KO], [DIAL | {"name": " "}], {}, "a stage has an empty name"),
    ([EN, KO | {"name": ""}], [DIAL], {}, "a source has an empty name"),
    ([EN | {"kind": "parralel"}, KO], [DIAL], {}, "kind 'parralel' is unknown; did you mean 'parallel'"),
    ([EN | {"language": "EN"}, KO], [DIAL], {}, "source 'web-en': language 'EN' is no .*; write 'en'"),
    ([EN | {"language": "en-US"}, KO], [DIAL], {}, "language 'en-US' is no .*; write 'en'"),
    ([EN | {"language": "eng"}, KO], [DIAL], {}, "language 'eng' is no .*; write 'en'"),
    ([EN, KO | {"language": "Korean"}], [DIAL], {}, "'web-ko': language 'Korean' is no .*; write a code such as"),
    ([EN, KO | {"language": ""}], [DIAL], {}, "'web-ko': language '' is no .*; write a code such as"),
    ([EN, KO], [DIAL], {"block_length": 250}, r"^seq_length \(100\) must divide block_length \(250\)"),
    ([EN, KO], [DIAL], {"max_epochs": 1.3}, r"'web-en' .* 1.4 epochs \(700 samples of 500.* max_epochs \(1.3\)"),
    ([EN, KO], [DIAL], {"max_epochs": 0.0}, r"max_epochs \(0.0\) must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("sources", "stages", "leaves", "message"), REFUSALS)
def test_what_cannot_be_meant_is_refused_with_its_numbers(
    sources: list[dict[str, Any]], stages: list[dict[str, Any]], leaves: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(sources, stages, **leaves)
    assert "\n" not in str(caught.value)


def test_a_source_too_small_for_a_slice_is_refused_only_where_it_is_read() -> None:
    with pytest.raises(DataError, match=r"'web-ko' has 100 tokens, too few for one slice of 100 .* 0.3 in stage 'one'"):
        plan_of([EN, KO], [DIAL], [50_000, 100])
    assert plan_of([EN, KO], [DIAL | {"non_english_share": 0.0}], [50_000, 100]).num_samples == 1000


def test_max_epochs_may_be_reached() -> None:
    assert plan_of([EN, KO], [DIAL], max_epochs=1.4).num_samples == 1000


def test_a_missing_file_is_named_with_its_source(tmp_path: Path) -> None:
    cfg = config([EN | {"paths": [str(tmp_path / "absent")]}], [DIAL])
    with pytest.raises(
        DataError, match=r"source 'web-en': no file .*absent.idx; .*prepare_corpus.py.*preprocess_data.py"
    ):
        open_sources(cfg)
    with pytest.raises(DataError, match="source 'web-en' has no paths"):
        open_sources(config([EN], [DIAL]))


# ---------------------------------------------------------------------------------------------------------- showing


def test_the_summary_counts_what_the_sampler_serves() -> None:
    plan = plan_of([EN, KO, OPUS], [DIAL | {"tokens": 70_700}, DIAL | {"name": "two", "non_english_share": 0.55}])
    facts = json.loads(json.dumps(summary(plan)))
    sources = plan.sampler().samples(0, plan.num_samples)[0]
    so_far = np.zeros(3, dtype=int)
    for stage, shown in zip(plan.stages, facts["stages"], strict=True):
        counts = np.bincount(sources[stage.begin_sample : stage.end_sample], minlength=3)
        so_far += counts
        assert [row["samples"] for row in shown["sources"]] == counts.tolist()
        assert [row["tokens"] for row in shown["sources"]] == (100 * counts).tolist()
        assert [row["share"] for row in shown["sources"]] == pytest.approx(counts / counts.sum())
        assert [row["epochs_so_far"] for row in shown["sources"]] == pytest.approx(so_far / 500)
        assert shown["share_by_language"]["ko"] == pytest.approx(counts[1:].sum() / counts.sum())
        quota = stage.samples * sum(stage.shares[1:])
        assert shown["deviation_in_samples"]["non-English"] == pytest.approx(float(counts[1:].sum() - quota))


def test_the_table_warns_of_many_epochs_unread_sources_and_dropped_tails() -> None:
    text = describe(plan_of([EN, KO, CODE], [DIAL], [10_050, 50_050, 90]))
    assert "warning: source 'web-en' is read 7.00 epochs, more than 4" in text
    assert "'web-ko' is read" not in text
    assert "warning: source 'github' is never read" in text
    assert "\ntails too short for a slice, not read (tokens): web-en 49, web-ko 49, github 90\n" in text
    assert "English 70.000% (+0.00 samples from its quota), non-English 30.000%" in text


def test_the_tails_of_many_sources_take_few_lines() -> None:
    sources: list[dict[str, Any]] = [EN, *(KO | {"name": f"source-{i}"} for i in range(18))]
    lines = describe(plan_of(sources, [DIAL])).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("tails"))
    assert len(lines[begin:]) <= 4 and all(len(line) <= 120 for line in lines[begin:])
    assert sum(line.count("source-") for line in lines[begin:]) == 18


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curriculum")
    for name in ("web-en", "web-ko"):
        with IndexedDatasetWriter(str(folder / f"{name}_text_document"), vocab_size=100) as writer:
            writer.add_document(list(range(90)) * 100)
            writer.finalize()
    tree = {
        "model": {"seq_length": 64},
        "data": {"data_root": str(folder), "sources": [EN, KO]},
        "curriculum": {"stages": [DIAL | {"tokens": 6400}, DIAL | {"name": "two", "tokens": 640}]},
    }
    (folder / "plan.yaml").write_text(json.dumps(tree))
    return folder / "plan.yaml"


def test_what_is_hardly_read_does_not_show_as_unread() -> None:
    rare = {"name": "s", "tokens": 10_000, "weights": {"web-en": 1.0, "web-ko": 99.0}}
    lines = describe(plan_of([EN, KO, OPUS], [rare], [1_000_000, 50_050, 50_050])).splitlines()
    epochs = {line.split()[0]: line.split()[6:8] for line in lines if line.startswith("  web-") or "opus" in line[:8]}
    assert epochs == {"web-en": ["<0.001"] * 2, "web-ko": ["0.198"] * 2, "opus-ko": ["0.000"] * 2}


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/curriculum.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)


def test_the_tool_prints_tables_json_and_samples(config_file: Path) -> None:
    table = tool(str(config_file), "--seed", "5")
    assert table.returncode == 0 and "seed 5" in table.stdout and "web-ko" in table.stdout, table.stderr
    facts = json.loads(tool("--json", str(config_file)).stdout)
    assert [stage["stage"] for stage in facts["stages"]] == ["one", "two"] and facts["samples"] == 110
    lines = [json.loads(line) for line in tool(str(config_file), "--samples", "98:103").stdout.splitlines()]
    assert [line["sample"] for line in lines] == [98, 99, 100, 101, 102]
    assert [line["stage"] for line in lines] == ["one", "one", "two", "two", "two"]
    assert all(list(line) == ["sample", "stage", "source", "epoch", "offset"] for line in lines)
    assert lines == [
        json.loads(line)
        for line in tool(str(config_file), "--samples=98:103", "--global-batch-size", "3").stdout.splitlines()
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "5:200"], "within the plan's 110 samples"),
        (["--samples", "ten"], "must be A:B"),
        (["--samples", "0:" + "9" * 5000], "must be A:B"),
        (["--samples", "-5:3"], "'?-5:3.* must be A:B"),
        (["--samples"], "expected one argument"),
        (["--json=yes"], "ignored explicit argument"),
        (["tiny"], "2 configs are given .*tiny"),
        (["--config", "tiny"], "2 configs are given .*tiny"),
        (["--seed", "-1"], "seed .-1. must lie"),
        (["--lr", ".inf"], "lr must be a number|lr .inf. must be a finite number"),
        (["--adam-beta1", "1"], "adam_beta1 .1.0. must lie"),
        (["--num-layers", "0"], "num_layers .0. must be positive"),
        (["--samplse", "0:1"], "unknown flag --samplse; did you mean 'samples'"),
        (["--data-root", "/nowhere"], "source 'web-en': no file /nowhere/web-en_text_document.idx"),
        (["--lr", "1e-5", "--min-lr", "1e-4"], r"min_lr \(0.0001\) must not exceed lr \(1e-05\)"),
        (["--seq-length", "100000"], "too few for one slice|less than one slice"),
    ],
)
def test_the_tool_ends_in_one_line_and_status_two(config_file: Path, words: list[str], message: str) -> None:
    done = tool(str(config_file), *words)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: .*({message}).*\n", done.stderr), done.stderr
    assert len(done.stderr) < 400


def test_the_tool_without_arguments_says_how_it_is_used() -> None:
    done = tool()
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*usage: tools/curriculum.py \{CONFIG \| --run RUN\} .*\n", done.stderr), done.stderr
