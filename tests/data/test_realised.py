"""A run beside its plan: shares and losses are those of its rows, and a step that was off the plan is named."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from test_curriculum import CODE, DIAL, EN, KO, OPUS, plan_of, tool
from test_curriculum import config_file as config_file  # a fixture

from megapoly.config import load_config
from megapoly.data.curriculum import Plan, make_plan, open_sources
from megapoly.data.plan_png import LEAST_OF_RUN, _of_stage, _windows_of_run, draw_png, groups_of
from megapoly.data.realised import Steps, _steps, describe_shares, losses_by_language, read_steps, share_report
from megapoly.errors import DataError

RAMP = DIAL | {"name": "rising", "non_english_share": {"from": 0.3, "to": 0.9}, "code_share": 0.1}


def plan() -> Plan:
    return plan_of([EN, KO, OPUS, CODE], [DIAL, RAMP])  # 1,000 samples of 100 tokens each


def rows_of(plan: Plan, batch: int = 48, end: int | None = None) -> list[dict[str, Any]]:
    """What a run of the plan writes; the loss of source i falls from 10 + i by a thousandth a step."""
    rows, begin, end = [], 0, plan.num_samples if end is None else end
    while begin < end:
        after = min(begin + batch, end)
        counts = zip(plan.sampler().counts(begin), plan.sampler().counts(after), strict=True)
        tokens = [(b - a) * plan.block_length for a, b in counts]
        names, step = [source.name for source in plan.sources], len(rows) + 1
        rows.append(
            {
                "step": step,
                "samples": after,
                "stage": plan.stages[plan.stage_at(begin)].name,
                "tokens_by_source": {name: n for name, n in zip(names, tokens, strict=True) if n},
                "loss_by_source": {
                    name: 10 + i - step / 1000 for i, (name, n) in enumerate(zip(names, tokens, strict=True)) if n
                },
            }
        )
        begin = after
    return rows


def steps_of(rows: list[dict[str, Any]]) -> Steps:
    return _steps(Path("metrics.jsonl"), [json.dumps(row) for row in rows], plan())


def test_shares_are_those_of_the_tokens_and_the_plan_is_that_of_the_same_samples() -> None:
    report = share_report(plan(), steps_of(rows_of(plan())))
    assert (report["steps"], report["samples"], report["of_samples"]) == (42, 2000, 2000)
    assert report["steps_off_the_plan"] == []
    one, rising = report["stages"]
    assert (one["samples"], one["steps"], rising["samples"]) == (1008, 21, 992)  # step 21 begins in the first stage
    found = plan().sampler().samples(0, 1008)[0]
    by_language = {row["language"]: row for row in one["languages"]}
    counts = {"en": (found == 0).sum(), "ko": ((found == 1) | (found == 2)).sum(), "code": (found == 3).sum()}
    planned = {"en": (700 + 8 * 0.9 * 0.697) / 1008, "ko": (300 + 8 * 0.9 * 0.303) / 1008, "code": 8 * 0.1 / 1008}
    for language, count in counts.items():
        row = by_language[language]
        assert (row["tokens"], row["share"]) == (100 * count, pytest.approx(count / 1008))
        assert row["planned_share"] == pytest.approx(planned[language], abs=1e-4)
        assert row["off_by_samples"] == pytest.approx(count - 1008 * row["planned_share"])
        assert abs(row["off_by_samples"]) <= 2
    assert rising["non_english_share"] == pytest.approx(rising["planned_non_english_share"], abs=0.003)
    assert rising["planned_non_english_share"] == pytest.approx(0.6024, abs=1e-3)  # code stands outside the dial


def test_losses_are_means_over_tokens_of_the_first_and_the_last_fifth_of_the_steps() -> None:
    plan_, rows = plan(), rows_of(plan(), end=1000)
    (stage,) = share_report(plan_, steps_of(rows))["stages"]
    ko = next(row for row in stage["languages"] if row["language"] == "ko")
    for key, part in (("first_loss", rows[:5]), ("last_loss", rows[-5:])):
        sums = [(row["tokens_by_source"].get(n, 0), row["loss_by_source"].get(n, 0.0)) for row in part
                for n in ("web-ko", "opus-ko")]  # fmt: skip
        assert ko[key] == pytest.approx(sum(n * loss for n, loss in sums) / sum(n for n, _ in sums))
    rows[0]["loss_by_source"] = dict.fromkeys(rows[0]["loss_by_source"])  # a loss that was not finite
    assert losses_by_language(plan_, steps_of(rows), 0, 1) == {}
    groups = {"en": "all", "ko": "all", "code": "all"}
    both = losses_by_language(plan_, steps_of(rows), 1, 2)
    assert min(both.values()) < losses_by_language(plan_, steps_of(rows), 1, 2, groups)["all"] < max(both.values())


def test_a_step_with_other_tokens_than_the_plans_is_named() -> None:
    rows = rows_of(plan())
    rows[6]["tokens_by_source"]["web-en"] -= 100
    rows[6]["tokens_by_source"]["web-ko"] += 100
    rows[9]["tokens_by_source"].pop("opus-ko", None)
    report = share_report(plan(), steps_of(rows))
    assert report["steps_off_the_plan"] == [7, 10]
    assert "2 of them not, first step 7" in describe_shares(report)
    assert "without exception" in describe_shares(share_report(plan(), steps_of(rows_of(plan()))))
    masked = share_report(plan(), steps_of(rows), has_masked_labels=True)
    assert masked["steps_off_the_plan"] is None and "to sample 2,000 of 2,000; labels are masked" in describe_shares(
        masked
    )


def test_a_run_that_went_on_from_a_checkpoint_elsewhere_begins_where_that_ended() -> None:
    whole, later = (share_report(plan(), steps_of(rows)) for rows in (rows_of(plan()), rows_of(plan())[30:]))
    assert later["first_step"] == 31 and later["steps"] == 12 and later["steps_off_the_plan"] == []
    assert [stage["stage"] for stage in later["stages"]] == ["rising"]
    assert later["stages"][0]["samples"] == 2000 - 30 * 48 and whole["stages"][1]["samples"] == 992
    assert describe_shares(later).startswith("12 steps from step 31 on, to sample 2,000 of 2,000; each step")
    rows = rows_of(plan())[30:]
    rows[4]["tokens_by_source"]["web-en"] -= 100
    assert share_report(plan(), steps_of(rows))["steps_off_the_plan"] == [35]


def leave_out(rows: list[dict[str, Any]], steps: range) -> None:
    for row in rows:
        if row["step"] in steps:
            del row["tokens_by_source"], row["loss_by_source"]
            row["left_out"] = True


def test_steps_that_a_rollback_left_out_are_named_and_in_no_share() -> None:
    """Steps 20 to 23, the last two of the first stage and the first of the next."""
    rows, whole = rows_of(plan()), share_report(plan(), steps_of(rows_of(plan())))
    leave_out(rows, range(20, 24))
    report = share_report(plan(), steps_of(rows))
    assert report["steps_left_out"] == [20, 21, 22, 23] and report["steps_off_the_plan"] == []
    assert (report["steps"], report["samples"]) == (42, 2000)
    sizes = [(stage["samples"], stage["steps"], stage["left_out_samples"]) for stage in report["stages"]]
    assert sizes == [(19 * 48, 19, 96), (992 - 96, 19, 96)]
    for stage in report["stages"]:
        assert all(abs(row["off_by_samples"]) <= 2 for row in stage["languages"])
        assert sum(row["planned_share"] for row in stage["languages"]) == pytest.approx(1)
    rising, before = (r["stages"][1]["planned_non_english_share"] for r in (report, whole))
    assert rising > before + 0.01  # what is left out is the beginning of the rise
    last = next(row for row in report["stages"][0]["languages"] if row["language"] == "en")
    assert last["last_loss"] == pytest.approx(10 - (16 + 17 + 18 + 19) / 4 / 1000, abs=1e-4)
    said = describe_shares(report).splitlines()
    assert said[1] == "4 of them, from step 20 to 23, were left out after a spike"
    assert "one: 912 samples in 19 steps, 96 more left out" in said
    assert share_report(plan(), steps_of(rows[19:]))["steps_left_out"] == [21, 22, 23]
    assert "left out" not in describe_shares(whole)
    assert sum(window.shares.get("en", 0) == 0 for window in _windows_of_run(plan(), steps_of(rows))) >= 1
    assert _of_stage(plan(), 1, steps_of(rows))[0]["ko"] == pytest.approx(0.9 * rising, abs=0.01)


def test_a_stage_that_is_left_out_as_a_whole_has_no_shares(tmp_path: Path) -> None:
    rows = rows_of(plan())
    leave_out(rows, range(1, 22))
    first = share_report(plan(), steps_of(rows))["stages"][0]
    assert (first["samples"], first["steps"], first["languages"], first["non_english_share"]) == (0, 0, [], 0.0)
    assert first["left_out_samples"] == 1008
    draw_png(plan(), str(tmp_path / "run.png"), steps_of(rows))
    assert (tmp_path / "run.png").read_bytes()[1:4] == b"PNG"


def test_the_table_says_what_the_report_says() -> None:
    report = share_report(plan(), steps_of(rows_of(plan(), end=528)))
    lines = describe_shares(report).splitlines()
    assert lines[0].startswith("11 steps, to sample 528 of 2,000; ") and "one: 528 samples in 11 steps" in lines
    en = next(line for line in lines if line.startswith("  en ")).split()
    row = report["stages"][0]["languages"][0]
    assert en == [
        "en", "70.000%", f"{row['share']:.3%}", f"{row['off_by_samples']:+.2f}", f"{row['tokens']:,}",
        f"{row['first_loss']:.3f}", f"{row['last_loss']:.3f}",
    ]  # fmt: skip
    assert not any(line.startswith("  code") for line in lines), "code is neither planned nor read"
    assert len({len(line) for line in lines[3:6]}) == 1
    assert "  non-English 29.924%, planned 30.000%" in lines  # 158 of 528 samples


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [], "holds no step"),
        (lambda lines: [*lines, lines[-1][:40]], "line 43: no step of a run"),
        (
            lambda lines: [lines[0].replace('"step": 1', '"step": 0')],
            "line 1: step 0 to sample 48 does not follow; the file was altered",
        ),
        (lambda lines: [*lines[:3], *lines[4:]], "line 4: step 5 to sample 240 does not follow"),
        (lambda lines: [*lines[:2], lines[1]], "line 3: step 2 to sample 96 does not follow"),
        (
            lambda lines: [lines[0], lines[1].replace('"samples": 96', '"samples": 48')],
            "line 2: step 2 to sample 48 does",
        ),
        (lambda lines: [lines[0].replace("web-ko", "web-xx")], "line 1: source 'web-xx' is not in the plan"),
        (lambda lines: [lines[0].replace('"samples": 48', '"samples": 4800')], "line 1: step 1 to sample 4800"),
        (lambda lines: [lines[0].replace('"step": 1', '"step": true')], "line 1: no step of a run"),
        (lambda lines: ["[1, 2]"], "line 1: no step of a run"),
        (lambda lines: [lines[0].replace("3400", "-3400")], "line 1: tokens_by_source of 'web-en' is -3400, no number"),
        (
            lambda lines: [lines[0].replace("3400", "1e300")],
            r"line 1: tokens_by_source of 'web-en' is 1e\+300, no number",
        ),
        (lambda lines: [lines[0].replace("9.999", '"9"', 1)], "line 1: loss_by_source of 'web-en' is 9, no number"),
    ],
)
def test_rows_of_no_run_of_this_plan_are_refused_by_their_line(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in damage([json.dumps(row) for row in rows_of(plan())])))
    with pytest.raises(DataError, match=message) as caught:
        read_steps(path, plan())
    assert "\n" not in str(caught.value)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(plan())) + '{"step": 43, "sam')
    assert read_steps(path, plan()).num == 42, "a row that is being written is left out"
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        read_steps(path, plan())


def test_thin_languages_are_one_area_and_the_others_have_their_own() -> None:
    sources = [{"name": "web-en", "language": "en"}, {"name": "github", "language": "en", "kind": "code"}]
    sources += [{"name": f"web-{code}", "language": code} for code in ("zh", "ko", "th", "he")]
    share = 100 * LEAST_OF_RUN
    weights = {"web-en": 50, "github": 1, "web-zh": 40, "web-ko": share + 0.2, "web-th": share - 0.2, "web-he": 1}
    groups = groups_of(plan_of(sources, [{"name": "s", "tokens": 900_000, "weights": weights}]))
    assert groups.names == ["en", "zh", "ko", "2 others", "code"]
    assert groups.group_of["th"] == groups.group_of["he"] == "2 others"
    assert groups.sums({"en": 5, "zh": 4, "ko": 3, "th": 2, "he": 1, "code": 6})["2 others"] == 3
    assert len(set(groups.colours.values())) == len(groups.colours)
    weights |= {"web-th": 20, "web-ko": 20}
    assert "he" in groups_of(plan_of(sources, [{"name": "s", "tokens": 900_000, "weights": weights}])).names


def test_the_shares_of_a_stage_are_compared_over_the_samples_that_were_read() -> None:
    part = steps_of(rows_of(plan(), end=1480))  # half of the ramp from 30% to 90%
    planned, real = _of_stage(plan(), 1, part)
    assert real["ko"] == pytest.approx(planned["ko"], abs=0.005) and planned["ko"] == pytest.approx(
        0.9 * 0.45, abs=0.01
    )
    whole = _of_stage(plan(), 1, None)
    assert whole[0]["ko"] == pytest.approx(0.9 * 0.6) and whole[1]["ko"] == pytest.approx(0.9 * 0.6, abs=0.002)
    not_begun = _of_stage(plan(), 1, steps_of(rows_of(plan(), end=480)))
    assert not_begun == (whole[0], {"en": 0.0, "ko": 0.0, "code": 0.0})


def test_windows_of_a_run_are_whole_steps_of_one_stage() -> None:
    seen = _windows_of_run(plan(), steps_of(rows_of(plan(), batch=30)))
    assert seen[0].begin == 0 and seen[-1].end == 2000
    assert all(a.end == b.begin and a.end % 30 == 0 for a, b in itertools.pairwise(seen))
    assert [w.stage for w in seen] == sorted(w.stage for w in seen) and {w.stage for w in seen} == {0, 1}
    assert all(w.end - w.begin >= 64 or w.end == 1020 for w in seen[:-1])
    assert 1020 in {w.end for w in seen}, "the last step that begins in the first stage ends a window"
    for window in seen:
        found = plan().sampler().samples(window.begin, window.end)[0]
        assert window.shares["en"] == pytest.approx((found == 0).mean()) and sum(
            window.shares.values()
        ) == pytest.approx(1)


def test_the_tool_shows_a_run(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_file.read_text())
    cfg = load_config(str(config_file))
    rows = rows_of(make_plan(cfg, [stream.num_tokens for stream in open_sources(cfg)]), batch=10)
    rows[2]["tokens_by_source"] = {"web-en": 10 * 64}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tool("--run", str(tmp_path), "--png", str(tmp_path / "a.png"))
    assert done.returncode == 0 and "1 of them not, first step 3" in done.stdout, done.stderr
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    report = json.loads(tool("--run", str(tmp_path), "--json").stdout)
    assert report["steps"] == 11 and [stage["stage"] for stage in report["stages"]] == ["one", "two"]
    assert "labels are masked" in tool("--run", str(tmp_path), "--eod-mask-loss").stdout
    for words, message in (
        ([str(config_file), "--run", str(tmp_path)], "2 configs are given"),
        (["--run", str(tmp_path / "none")], "none: has no config.yaml; give the folder of a run"),
    ):
        done = tool(*words)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_areas_of_a_run_are_what_it_read(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    rows = rows_of(plan(), end=1000)  # half of the run, 30% Korean
    draw_png(plan(), str(tmp_path / "run.png"), steps_of(rows))
    image = (imread(tmp_path / "run.png")[..., :3] * 255).round().astype(int)
    colours = groups_of(plan()).colours
    area = {x: (abs(image - [int(colours[x][i : i + 2], 16) for i in (1, 3, 5)]).sum(2) == 0) for x in ("en", "ko")}
    assert area["ko"].sum() / (area["en"].sum() + area["ko"].sum()) == pytest.approx(0.3, abs=0.03)
    draw_png(plan(), str(tmp_path / "plan.png"))
    whole = (imread(tmp_path / "plan.png")[..., :3] * 255).round().astype(int)
    columns = {(abs(i - [int(colours["en"][k : k + 2], 16) for k in (1, 3, 5)]).sum(2) == 0).any(0).sum() / i.shape[1]
               for i in (image, whole)}  # fmt: skip
    assert min(columns) / max(columns) == pytest.approx(0.5, abs=0.03), "what is not read yet is left blank"
