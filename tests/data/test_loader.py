"""Batches: the same samples on any number of ranks, short ends masked, no rank bound to one source."""

import dataclasses
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import VOCAB, tiny_config

from megapoly.data.batch import Documents, batch_of
from megapoly.data.batch_sizes import BatchSizes
from megapoly.data.curriculum import Plan, PlanStage, make_plan, open_sources
from megapoly.data.indexed import TokenStream
from megapoly.data.loader import Deal, TrainLoader, ValidLoader
from megapoly.data.shares import ShareStep
from megapoly.sections import CurriculumConfig, Stage


@pytest.fixture
def data(tmp_path: Path) -> tuple[Plan, list[TokenStream]]:
    cfg = tiny_config(tmp_path, "gpt2", 20)
    streams = open_sources(cfg, VOCAB)
    return make_plan(cfg, [s.num_tokens for s in streams]), streams


def rows_of(plan: Plan, streams: list[TokenStream], first: int, end: int, mbs: int, dp: int) -> Counter[tuple]:
    rows: Counter[tuple] = Counter()
    for rank in range(dp):
        for batch in TrainLoader(plan, streams, Deal(8, mbs, rank, dp)).batch(first, end):
            for tokens, labels, mask, source in zip(batch.tokens, batch.labels, batch.mask, batch.sources, strict=True):
                if mask.any():
                    assert mask.all() and (tokens[1:] == labels[:-1]).all()
                    rows[int(source), tokens.tobytes(), labels.tobytes()] += 1
    return rows


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 4), (1, 8)])
def test_a_step_has_the_same_samples_on_any_layout(data: tuple[Plan, list[TokenStream]], mbs: int, dp: int) -> None:
    plan, streams = data
    sources, _, offsets = plan.sampler().samples(0, plan.num_samples)
    for first in (0, 8, 19, 152):
        expected: Counter[tuple] = Counter()
        for n in range(first, first + 8):
            piece = streams[sources[n]].read(offsets[n] * 16, offsets[n] * 16 + 17)
            expected[int(sources[n]), piece[:-1].tobytes(), piece[1:].tobytes()] += 1
        assert rows_of(plan, streams, first, first + 8, mbs, dp) == expected


def test_batches_do_not_depend_on_what_is_looked_up_at_once(
    data: tuple[Plan, list[TokenStream]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [rows_of(*data, first, first + 8, 1, 2) for first in range(0, 152, 8)]
    monkeypatch.setattr("megapoly.data.loader.WINDOW", 13)
    loader = TrainLoader(*data, Deal(8, 1, 0, 1))
    for number in [*range(19), 3, 4, 2]:  # forward, and back as after a change of the plan's place
        rows = Counter(
            (int(b.sources[0]), b.tokens.tobytes(), b.labels.tobytes())
            for b in loader.batch(8 * number, 8 * number + 8)
        )
        assert rows == wanted[number]


def test_the_last_batch_may_be_short(data: tuple[Plan, list[TokenStream]]) -> None:
    plan, streams = data
    assert rows_of(plan, streams, 16, 19, 1, 2).total() == 3


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (2, 2), (1, 8)])
def test_a_stage_of_shorter_sequences_walks_its_blocks_in_order(mbs: int, dp: int, tmp_path: Path) -> None:
    """Blocks of 48 tokens: three sequences of 16, then one of 48, then six of 8; every token of a block once."""
    stages = [
        {"name": str(n), "tokens": 48 * 8, "non_english_share": 0.5, "seq_length": length, "global_batch_size": batch}
        for n, (length, batch) in enumerate([(16, 24), (48, 8), (8, 48)])
    ]
    cfg = tiny_config(tmp_path, "gpt2", max_position_embeddings=48, stages=stages)
    streams = open_sources(cfg, VOCAB)
    plan = make_plan(cfg, [s.num_tokens for s in streams])
    assert plan.block_length == 48 and plan.num_samples == 24
    sizes = BatchSizes.of(cfg.train, plan)
    sources, _, offsets = plan.sampler().samples(0, 24)
    for first, length in ((0, 16), (8, 48), (16, 8)):
        assert (sizes.at(first), sizes.end(first)) == (8, first + 8)
        expected: Counter[tuple] = Counter()
        for n in range(first, first + 6):
            piece = streams[sources[n]].read(offsets[n] * 48, offsets[n] * 48 + 49)
            for begin in range(0, 48, length):
                row = piece[begin : begin + length + 1]
                expected[int(sources[n]), row[:-1].tobytes(), row[1:].tobytes()] += 1
        rows: Counter[tuple] = Counter()
        for rank in range(dp):
            for batch in TrainLoader(plan, streams, Deal(8, mbs, rank, dp), sizes).batch(first, first + 6):
                assert batch.tokens.shape == (mbs, length)
                for i in np.flatnonzero(batch.mask.all(1)):
                    rows[int(batch.sources[i]), batch.tokens[i].tobytes(), batch.labels[i].tobytes()] += 1
        assert rows == expected


def test_no_rank_is_bound_to_one_source(data: tuple[Plan, list[TokenStream]], tmp_path: Path) -> None:
    _, streams = data
    stage = Stage(name="even", tokens=20 * 8 * 16, non_english_share=0.5)  # the two sources take turns exactly
    cfg = dataclasses.replace(tiny_config(tmp_path, "gpt2", 20), curriculum=CurriculumConfig(stages=[stage]))
    plan = make_plan(cfg, [s.num_tokens for s in streams])
    for rank in range(8):
        loader = TrainLoader(plan, streams, Deal(8, 1, rank, 8))
        assert len({int(batch.sources[0]) for n in range(20) for batch in loader.batch(8 * n, 8 * n + 8)}) == 2


@pytest.mark.parametrize(("dp", "mbs"), [(2, 1), (4, 1), (8, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize("first", [0, 10**12])
def test_a_mixture_that_takes_turns_reaches_every_rank_in_equal_parts(
    data: tuple[Plan, list[TokenStream]], dp: int, mbs: int, first: int
) -> None:
    # Megatron-LM's ranks take fixed places: of two sources at 1/2 each, every other rank would see one source only.
    plan, streams = data
    end = first + 8 * 500
    half = PlanStage("even", 0, end, (ShareStep(end, (Fraction(1, 2), Fraction(1, 2))),), plan.block_length)
    even = dataclasses.replace(plan, stages=(half,))
    sources = even.sampler().samples(first, first + 8)[0].tolist()
    assert sources in ([0, 1] * 4, [1, 0] * 4)  # the aliasing is there to be avoided
    for rank in range(dp):
        loader = TrainLoader(even, streams, Deal(8, mbs, rank, dp))
        seen = [
            int(source)
            for n in range(first, first + 8 * 500, 8)
            for batch in loader.batch(n, n + 8)
            for source in batch.sources
        ]
        # Places are drawn without replacement within a batch: the spread is at most that of independent draws.
        assert abs(sum(seen) - len(seen) / 2) < 4 * len(seen) ** 0.5 / 2, (rank, sum(seen), len(seen))


@pytest.mark.parametrize("dp", [1, 2])
def test_held_out_text_is_read_whole_and_once(data: tuple[Plan, list[TokenStream]], dp: int, tmp_path: Path) -> None:
    streams = [TokenStream([str(tmp_path / f"{name}_valid_text_document")], VOCAB) for name in ("en", "ko")]
    loaders = [ValidLoader([streams[0], None, streams[1]], 16, Deal(8, 2, rank, dp), None) for rank in range(dp)]
    labels: dict[int, list[int]] = {0: [], 2: []}
    slices = sorted(
        (int(source), order, tuple(row_labels[mask > 0].tolist()))
        for loader in loaders
        for number in range(loader.num_batches)
        for i, batch in enumerate(loader.batch(number))
        for j, (source, row_labels, mask) in enumerate(zip(batch.sources, batch.labels, batch.mask, strict=True))
        for order in [number * 8 + loader.deal.positions(i)[j]]
    )
    for source, _, row in slices:
        labels.setdefault(source, []).extend(row)
    assert labels[0] == streams[0].read(1, streams[0].num_tokens).tolist()
    assert labels[2] == streams[1].read(1, streams[1].num_tokens).tolist()


def test_a_bounded_evaluation_keeps_every_source(tmp_path: Path, data: tuple[Plan, list[TokenStream]]) -> None:
    _, streams = data
    loader = ValidLoader(list(streams), 16, Deal(8, 1, 0, 1), max_batches=2)
    assert loader.num_batches == 2
    assert Counter(source for source, _ in loader.slices) == {0: 8, 1: 8}


def test_batches_mask_what_a_slice_lacks() -> None:
    batch = batch_of([np.array([5, 6, 7]), np.array([9]), np.array([], dtype=np.int64)], [1, 2, 0], 4)
    assert batch.tokens.tolist() == [[5, 6, 0, 0], [0] * 4, [0] * 4]
    assert batch.labels.tolist() == [[6, 7, 0, 0], [0] * 4, [0] * 4]
    assert batch.mask.tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4]


@given(st.data())
@settings(deadline=None)
def test_documents_begin_with_rows_and_after_their_ends_and_padding_is_one(data: st.DataObject) -> None:
    length, eod = data.draw(st.integers(1, 9)), 3
    slices = [np.array(data.draw(st.lists(st.integers(0, 4), max_size=length + 1)), np.int64) for _ in range(3)]
    masks = data.draw(st.booleans())
    batch = batch_of(slices, [0, 0, 0], length, Documents(eod, are_apart=True, masks_eod=masks))
    plain = batch_of(slices, [0, 0, 0], length)
    assert (batch.tokens == plain.tokens).all() and (batch.labels == plain.labels).all()
    begins = [
        row * length + place
        for row in range(3)
        for place in range(length)
        if place in (0, padding := max(len(slices[row]) - 1, 0))
        or (place < padding and plain.tokens[row, place - 1] == eod)
    ]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [*begins, 3 * length]
    follows_an_end = plain.tokens == eod
    assert (batch.mask == np.where(follows_an_end & masks, 0, plain.mask)).all()
    assert plain.cu_seqlens is None
