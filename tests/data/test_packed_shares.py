"""Shares of packed sources are of text: padding counts nowhere, in no way of giving them and at no prefix."""

import itertools
import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_curriculum import CODE, DIAL, EN, KO, OPUS, config, plan_of
from test_packing import packed_pair

from megapoly.data.curriculum import Plan, make_plan, open_sources, plan_for
from megapoly.data.indexed import IndexedDatasetWriter
from megapoly.data.infilling import Infilling
from megapoly.data.loader import Deal, TrainLoader
from megapoly.data.packed import PackedStream
from megapoly.data.plan_changes import plan_changes
from megapoly.data.plan_picture import windows
from megapoly.data.plan_png import draw_png, groups_of
from megapoly.data.plan_report import describe, summary
from megapoly.data.realised import read_steps
from megapoly.errors import ConfigError, DataError

PACKED_KO = KO | {"packed": True}
LENGTH = 100  # of test_curriculum's samples
ROWS = 625
TOKENS = [50_050, 50_625]  # of Korean 50,000 to predict in 625 rows: 80 of 100 places


def packed_plan(
    sources: Sequence[dict[str, Any]], stages: list[dict[str, Any]], tokens: list[int], rows: list[int]
) -> Plan:
    return make_plan(config(list(sources), stages), tokens, rows)


def dialled(**more: Any) -> Plan:
    return packed_plan([EN, PACKED_KO], [DIAL | more], TOKENS, [0, ROWS])


# ------------------------------------------------------------------------------------------------------- the ways


def test_the_dial_counts_text() -> None:
    plan = dialled()
    assert plan.sources[1].slices == ROWS and plan.sources[1].fullness(LENGTH) == Fraction(4, 5)
    assert plan.text_shares(plan.stages[0].shares) == [Fraction(7, 10), Fraction(3, 10)]
    # Of 1,000 samples x English ones and 1,000 - x Korean ones, four fifths full: x : 0.8 (1,000 - x) as 7 : 3.
    assert plan.stages[0].shares == (Fraction(28, 43), Fraction(15, 43))
    assert plan.num_samples == 1000 and plan.sampler().counts(1000) == [651, 349]


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ({"weights": {"web-en": 1, "web-ko": 3}}, Fraction(3, 4)),
        ({"language_weights": {"en": 3, "ko": 2}}, Fraction(2, 5)),
        ({"alpha": 1.0}, Fraction(50_625, 100_675)),
        ({"temperature": 1.0}, Fraction(50_625, 100_675)),
        ({"unimax": 4}, Fraction(1, 2)),
        ({"non_english_share": 0.9}, Fraction(9, 10)),
    ],
)
def test_every_way_counts_text(way: dict[str, Any], expected: Fraction) -> None:
    plan = dialled(non_english_share=None, **way) if "non_english_share" not in way else dialled(**way)
    assert plan.text_shares(plan.stages[0].shares)[1] == expected
    assert plan.planned_shares(3, 700)[1] == pytest.approx(float(expected), abs=1e-12)


def test_every_step_of_a_ramp_counts_text() -> None:
    ramp = {"from": 0.2, "to": 0.8, "shape": "linear"}
    ours, plain = (dialled(non_english_share=ramp), plan_of([EN, KO], [DIAL | {"non_english_share": ramp}]))
    for mine, theirs in zip(ours.stages[0].steps, plain.stages[0].steps, strict=True):
        assert mine.samples == theirs.samples
        assert tuple(ours.text_shares(mine.shares)) == theirs.shares


def test_code_has_its_share_of_the_text_too() -> None:
    sources = [EN, PACKED_KO, CODE | {"packed": True}]
    for way in ({"non_english_share": 0.5}, {"alpha": 0.3}, {"unimax": 9}):
        stage = {"name": "one", "tokens": 60_000, "code_share": 0.25} | way
        plan = packed_plan(sources, [stage], [*TOKENS, 10_100], [0, ROWS, 200])
        assert plan.text_shares(plan.stages[0].shares)[2] == Fraction(1, 4)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_unimax_is_alike_in_text_and_never_above_its_epochs(data: st.DataObject) -> None:
    languages = data.draw(st.lists(st.sampled_from(["en", "ko", "de"]), min_size=1, max_size=5))
    rows = [data.draw(st.integers(30, 400)) for _ in languages]
    fills = [data.draw(st.integers(20, 100)) for _ in languages]  # of 100 places of a row
    is_packed = [data.draw(st.booleans()) for _ in languages]
    weights = [data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in languages]
    sources = [
        {"name": f"{i}", "language": language, "packed": packed or None, "weight": weight}
        for i, (language, packed, weight) in enumerate(zip(languages, is_packed, weights, strict=True))
    ]
    tokens = [n * (fill + 1) if packed else n * 100 + 1 for n, fill, packed in zip(rows, fills, is_packed, strict=True)]
    code = data.draw(st.sampled_from([0.0, 0.3]))
    sources.append({"name": "code", "language": "en", "kind": "code", "packed": True, "weight": 1.0})
    stage = {"name": "one", "tokens": data.draw(st.integers(1, 600)) * 100, "unimax": 2.5, "code_share": code}
    counted = [n if packed else 0 for n, packed in zip(rows, is_packed, strict=True)]
    try:
        plan = packed_plan(sources, [stage], [*tokens, 5 * 51], [*counted, 5])
    except ConfigError as error:
        assert "unimax 2.5 leaves" in str(error)
        return
    shares = plan.text_shares(plan.stages[0].shares)
    assert sum(plan.stages[0].shares) == 1 and shares[-1] == Fraction(repr(code))
    text = [plan.num_samples * amount for amount in plan.text(plan.stages[0].shares)]
    rooms = [source.fullness(LENGTH) * max(Fraction("2.5") * source.slices - 2, 0) for source in plan.sources]
    assert all(amount <= room for amount, room in zip(text[:-1], rooms, strict=False))
    of_language = {x: [i for i, other in enumerate(languages) if other == x] for x in languages}
    level = max(sum(text[i] for i in own) for own in of_language.values())
    for own in of_language.values():
        given = sum(text[i] for i in own)
        assert given == min(level, sum(rooms[i] for i in own))
        rates = [text[i] / Fraction(weights[i]) for i in own]
        for i, rate in zip(own, rates, strict=True):  # within a language by weight, as far as there is room
            assert rate == max(rates) or text[i] == rooms[i]


# ------------------------------------------------------------------------------------------------------ at a prefix


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 60), st.booleans()), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=5, max_size=5),
    st.integers(1, 3000),
)
@settings(max_examples=150, deadline=None)
def test_at_every_prefix_the_text_is_within_two_samples_of_each_quota(
    drawn: list[tuple[int, int, bool]], weights: list[int], n: int
) -> None:
    sources = [{"name": f"s{i}", "language": "ko", "packed": packed} for i, (_, _, packed) in enumerate(drawn)]
    tokens = [rows * (fill + 1) if packed else rows * 100 + 1 for fill, rows, packed in drawn]
    named = {f"s{i}": float(weight) for i, weight in zip(range(len(drawn)), weights, strict=False)}
    plan = packed_plan(
        sources, [{"name": "one", "tokens": 300_000, "weights": named}], tokens, [rows for _, rows, _ in drawn]
    )
    assert plan.num_samples == 3000
    sampler, whole = plan.sampler(), sum(named.values())
    assert all(abs(c - q) <= 2 for c, q in zip(sampler.counts(n), sampler.quotas(n), strict=True))
    quotas = plan.text(sampler.quotas(n))
    for source, quota, weight in zip(plan.sources, quotas, named.values(), strict=True):
        assert quota == sum(quotas) * Fraction(weight) / Fraction(whole)
        assert source.fullness(LENGTH) == (Fraction(source.tokens - source.slices, source.slices * LENGTH)
                                           if source.packed else 1)  # fmt: skip


def sources_on_disk(folder: Path, length: int = 16) -> tuple[list[dict[str, Any]], list[int]]:
    """A plain English source and a packed Korean one; and the labels in each of the packed rows."""
    rng = np.random.default_rng(4)
    prefix, rows = packed_pair(folder / "ko", rng.integers(2, 30, 400).tolist(), length)
    with IndexedDatasetWriter(str(folder / "en"), 1000) as writer:
        for size in rng.integers(2, 30, 700):
            writer.add_document(np.append(np.full(size - 1, 500), 0))
        writer.finalize()
    found = [
        {"name": "en", "language": "en", "paths": [str(folder / "en")]},
        {"name": "ko", "language": "ko", "paths": [prefix], "packed": True},
    ]
    return found, [sum(map(len, row)) - 1 for row in rows]


def test_the_tokens_that_are_served_have_the_shares_at_every_prefix(tmp_path: Path) -> None:
    sources, labels = sources_on_disk(tmp_path)
    stage = {"name": "one", "tokens": 30_000, "non_english_share": 0.4}
    cfg = config(sources, [stage], block_length=16)
    cfg = type(cfg)(**{**vars(cfg), "model": type(cfg.model)(seq_length=16)})
    streams = open_sources(cfg, 1000)
    assert isinstance(streams[1], PackedStream)
    plan = plan_for(cfg, streams)
    loader = TrainLoader(plan, streams, Deal(1, 1, 0, 1))
    served, counts = np.zeros(2, int), np.zeros(2, int)
    for n in range(plan.num_samples):
        (batch,) = loader.batch(n, n + 1)
        source = int(batch.sources[0])
        served[source] += int(batch.mask.sum())
        counts[source] += 1
        # Two samples by the order's bound, and two for rows that came fuller or emptier than their mean.
        assert abs(served[1] - 0.4 * served.sum()) < 4 * 16, n
        if source == 1 and counts[1] % len(labels) == 0:
            assert served[1] == counts[1] // len(labels) * sum(labels)  # whole epochs have all text, and it alone
    assert counts[1] > len(labels) > 100
    shown = summary(plan)["stages"][0]
    assert shown["sources"][1]["tokens"] == pytest.approx(served[1], abs=2 * 16)
    assert shown["text_tokens"] == pytest.approx(served.sum(), abs=2 * 16) and shown["text_tokens"] < shown["tokens"]


@pytest.mark.parametrize("parts", [2, 4])
def test_shorter_sequences_walk_a_row_and_may_be_all_padding(tmp_path: Path, parts: int) -> None:
    prefix, rows = packed_pair(tmp_path / "ko", [17, 6, 17, 9, 12], 16)
    source = {"name": "ko", "language": "ko", "paths": [prefix], "packed": True}
    stage = {"name": "one", "tokens": len(rows) * 16, "weights": {"ko": 1.0}, "seq_length": 16 // parts}
    cfg = config([source], [stage], block_length=16)
    cfg = type(cfg)(**{**vars(cfg), "model": type(cfg.model)(seq_length=16)})
    streams = open_sources(cfg)
    plan = plan_for(cfg, streams)
    batches = [TrainLoader(plan, streams, Deal(parts, 1, 0, 1)).batch(n, n + 1) for n in range(plan.num_samples)]
    seen = [int(batch.mask.sum()) for of_step in batches for batch in of_step]
    assert sum(seen) == sum(sum(map(len, row)) - 1 for row in rows) and 0 in seen
    found = sorted(
        int(label)
        for of_step in batches
        for batch in of_step
        for label, counts in zip(batch.labels[0], batch.mask[0], strict=True)
        if counts
    )
    assert found == sorted(itertools.chain(*(list(itertools.chain(*row))[1:] for row in rows)))


def test_infilling_cuts_whole_documents_of_a_row(tmp_path: Path) -> None:
    prefix, rows = packed_pair(tmp_path / "ko", [9, 20, 11, 14, 8, 30] * 4, 40)
    stream, how = PackedStream([prefix], 40), Infilling(0, 900, 901, 902, (1.0,), 0.5, 3)
    for k, row in enumerate(rows):
        made = how.apply(stream.read(40 * k, 40 * k + 41), 0, k).tolist()
        begin = 0
        for text in row:
            cut = made[begin : begin + len(text)]
            assert cut[-1] == 0 and cut.count(0) == 1
            assert sorted(cut)[:-3] == sorted(text)[:-3] and sorted(cut)[-3:] == [900, 901, 902]
            begin += len(text)
        assert begin == len(made)


# ------------------------------------------------------------------------------------------------------ what is shown


def test_tables_and_pictures_are_of_text() -> None:
    plan = dialled()
    facts = json.loads(json.dumps(summary(plan)))
    assert facts["sources"][1] | {"language": ""} == {
        "name": "web-ko", "language": "", "kind": "text", "tokens": 50_625, "slices": 625, "dropped_tokens": 0,
        "packed": True, "padding_tokens": 12_500,
    }  # fmt: skip
    stage = facts["stages"][0]
    assert [row["tokens"] for row in stage["sources"]] == [65_100, 27_920]
    assert (stage["tokens"], stage["text_tokens"]) == (100_000, 93_020)
    assert [row["share"] for row in stage["sources"]] == pytest.approx([651 / 930.2, 279.2 / 930.2])
    assert [row["planned_share"] for row in stage["languages"]] == [0.7, 0.3]
    assert stage["share_by_part"]["non-English"] == stage["non_english_share"] == pytest.approx(279.2 / 930.2)
    assert stage["deviation_in_samples"]["non-English"] == pytest.approx(349 - 1000 * 15 / 43)
    text = describe(plan)
    assert "one: samples 0 to 1,000 (100,000 tokens, 93,020 of them text)" in text
    assert "\npacked: web-ko 625 rows, 80.00% full; shares and tokens are of text, without the padding" in text
    (window,) = windows(plan, 1)
    assert window.shares == pytest.approx({"en": 651 / 930.2, "ko": 279.2 / 930.2})


@pytest.mark.parametrize("is_run", [False, True], ids=["plan", "run"])
def test_pictures_show_shares_of_text_and_not_of_rows(tmp_path: Path, is_run: bool) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    plan = dialled()
    rows = []
    for begin in range(0, 1000, 50):
        before, after = (plan.sampler().counts(n) for n in (begin, begin + 50))
        read = {"web-en": 100 * (after[0] - before[0]), "web-ko": 80 * (after[1] - before[1])}  # rows are 80% full
        losses = dict.fromkeys(read, 5.0)
        rows.append({"step": len(rows) + 1, "samples": begin + 50, "tokens_by_source": read, "loss_by_source": losses})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = read_steps(tmp_path / "metrics.jsonl", plan) if is_run else None
    draw_png(plan, str(tmp_path / "a.png"), steps)
    image = (imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int)
    en, ko = (
        (abs(image - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).sum(2) == 0).sum(0)
        for colour in map(groups_of(plan).colours.get, ("en", "ko"))
    )
    whole = en + ko > 0.95 * (en + ko).max()  # columns without a line or the legend over them
    assert whole.sum() > 300
    # A third and more of the samples, as they are not full.
    assert ko[whole].sum() / (en + ko)[whole].sum() == pytest.approx(0.3, abs=0.01) and plan.stages[0].shares[1] > 0.34


def test_a_plan_without_packed_sources_says_nothing_of_it() -> None:
    text = describe(plan_of([EN, KO, OPUS], [DIAL]))
    assert "packed" not in text and "of them text" not in text


# ------------------------------------------------------------------------------------------------------ changed plans


def test_what_is_packed_decides_the_fingerprint_and_is_named() -> None:
    ours = dialled()
    fewer = packed_plan([EN, PACKED_KO], [DIAL], TOKENS, [0, ROWS - 1])
    plain = plan_of([EN, KO], [DIAL], TOKENS)
    full = [TOKENS[0], 90 * 101]  # no padding, and as many rows as slices: they are others all the same
    brimming, streaming = packed_plan([EN, PACKED_KO], [DIAL], full, [0, 90]), plan_of([EN, KO], [DIAL], full)
    assert brimming.sources[1].slices == streaming.sources[1].slices == 90
    assert brimming.stages[0].shares == streaming.stages[0].shares
    plans = (ours, fewer, plain, brimming, streaming)
    assert len({plan.fingerprint() for plan in plans}) == 5
    assert ours.fingerprint() == dialled().fingerprint()
    said = [[str(change) for change in plan_changes(old, ours) if change.since == 0] for old in (fewer, plain)]
    assert "source 'web-ko' was 624 packed rows and is 625 packed rows" in said[0]
    assert "source 'web-ko' was not packed and is 625 packed rows" in said[1]
    assert re.search(r"had 0\.3 non-English and has 0\.3 \(shares of samples: 'web-ko' 0\.3 -> 0\.3\d+, ", said[1][1])
    assert plan_changes(ours, dialled()) == []
    assert list(map(str, plan_changes(streaming, brimming))) == ["source 'web-ko' was not packed and is 90 packed rows"]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_is_not_as_declared_is_refused(tmp_path: Path) -> None:
    prefix, _ = packed_pair(tmp_path / "ko", [5] * 40, 99)

    def opened(packed: bool | None, block: int = 100) -> int:
        source = {"name": "ko", "language": "ko", "paths": [prefix], "packed": packed}
        return open_sources(config([source], [], block_length=block))[0].num_rows

    with pytest.raises(
        DataError, match=r"source 'ko': .*p is packed \(.*p\.pack\.json\); give the source `packed: true`"
    ):
        opened(None)
    with pytest.raises(DataError, match=r"p: is packed for samples of 99 tokens, not of 100 \(block_length\)"):
        opened(True)
    assert opened(False) == 0
    Path(f"{prefix}.pack.json").unlink()
    assert opened(None) == 0
    with pytest.raises(DataError, match=r"p\.pack\.json: no such file, so the pair is not packed"):
        opened(True)


def test_rows_of_single_tokens_have_nothing_to_predict() -> None:
    with pytest.raises(DataError, match=r"source 'web-ko' has 5 tokens, too few"):
        packed_plan([EN, PACKED_KO], [DIAL], [50_050, 5], [0, 5])
