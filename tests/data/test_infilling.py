"""Fill-in-the-middle: what is cut can be put together again, and depends on nothing but seed and sample."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_runs import tiny_config

from megapoly.data.curriculum import make_plan, open_sources
from megapoly.data.infilling import Infilling, make_infilling
from megapoly.data.loader import Deal, TrainLoader
from megapoly.errors import ConfigError, TokenizerError
from megapoly.sections import DataConfig, Source
from megapoly.tokenizer.load import load_tokenizer
from megapoly.tokenizer.train import train_byte_level_bpe

EOD, PREFIX, MIDDLE, SUFFIX = 0, 1, 2, 3
texts = st.lists(st.lists(st.integers(4, 20), max_size=30), min_size=1, max_size=4)


def infilling(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 7) -> Infilling:
    return Infilling(EOD, PREFIX, MIDDLE, SUFFIX, (rate, 0.0), spm_rate, seed)


def documents(tokens: NDArray[np.integer]) -> list[list[int]]:
    ends = np.flatnonzero(tokens == EOD)
    return [part[part != EOD].tolist() for part in np.split(tokens, ends)]


def put_together(document: list[int]) -> tuple[str, list[int]]:
    """The kind of cut and the document before it, but for its last three tokens."""
    if PREFIX not in document:
        return "none", document
    suffix, middle = document.index(SUFFIX), document.index(MIDDLE)
    assert document[0] == PREFIX and sum(token in (PREFIX, SUFFIX, MIDDLE) for token in document) == 3
    if suffix == 1:  # of a prefix without tokens both ways are the same
        return "spm", document[middle + 1 :] + document[2:middle]
    return "psm", document[1:suffix] + document[middle + 1 :] + document[suffix + 1 : middle]


@given(texts, st.integers(0, 10**15), st.floats(0, 1), st.sampled_from([np.int64, np.uint16]))
def test_what_is_cut_can_be_put_together_again(
    text: list[list[int]], sample: int, spm_rate: float, dtype: type
) -> None:
    tokens = np.array([token for document in text for token in (*document, EOD)], dtype)
    made = infilling(spm_rate=spm_rate).apply(tokens, 0, sample)
    assert made.dtype == dtype and len(made) == len(tokens)
    assert ((made == EOD) == (tokens == EOD)).all()
    for before, after in zip(documents(tokens), documents(made), strict=True):
        kind, whole = put_together(after)
        assert (kind == "none") == (len(before) <= 3)
        assert whole == (before if kind == "none" else before[:-3])


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.1), (1.0, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_the_rates_are_kept(rate: float, spm_rate: float) -> None:
    tokens = np.tile(np.r_[np.arange(4, 54), EOD], 10)
    cut, first, lengths = 0, 0, []
    for sample in range(200):
        for document in documents(infilling(rate, spm_rate).apply(tokens, 0, sample))[:10]:
            cut += PREFIX in document
            if PREFIX in document and document[0] == PREFIX:
                first += document[1] == SUFFIX and document.index(MIDDLE) > 1
                lengths.append(len(document) - 1 - document.index(MIDDLE))
    assert abs(cut / 2000 - rate) < 0.04
    if cut:
        share = spm_rate + (1 - spm_rate) * 2 / 48  # of 48 x 48 / 2 pairs of cuts, 1 in 24 leaves no prefix
        assert abs(first / cut - share) < 0.05
        if spm_rate == 0:
            assert abs(np.mean(lengths) - 47 / 3) < 1 and max(lengths) > 40 and min(lengths) == 0


def test_other_sources_samples_and_seeds() -> None:
    tokens = np.arange(4, 400)
    assert infilling().apply(tokens, 1, 5) is tokens
    made = [infilling(seed=seed).apply(tokens, 0, sample).tolist() for seed in (7, 8) for sample in (0, 1, 2**40)]
    made += [infilling().apply(tokens, 0, 0, sequence).tolist() for sequence in (1, 2)]
    assert len({tuple(one) for one in made}) == 8
    assert made[0] == infilling().apply(tokens, 0, 0).tolist()
    twice = infilling().apply(np.r_[tokens, EOD, tokens], 0, 0)
    assert not (twice[: len(tokens)] == twice[len(tokens) + 1 :]).all()


def test_no_rank_changes_what_is_cut(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 4)
    streams = open_sources(cfg)
    plan = make_plan(cfg, [stream.num_tokens for stream in streams])

    def rows(dp: int, how: Infilling | None) -> dict[int, list[list[int]]]:
        found: dict[int, list[list[int]]] = {0: [], 1: []}
        for rank in range(dp):
            for batch in TrainLoader(plan, streams, Deal(8, 1, rank, dp), infilling=how).batch(16, 24):
                for source, tokens, labels in zip(batch.sources, batch.tokens, batch.labels, strict=True):
                    found[source].append([*tokens.tolist(), labels[-1].item()])
        return {source: sorted(tokens) for source, tokens in found.items()}

    how = Infilling(EOD, 1000, 1001, 1002, (1.0, 0.0), 0.5, 3)
    plain, alone = rows(1, None), rows(1, how)
    assert alone == rows(4, how) and alone[1] == plain[1] and alone[0] != plain[0]
    expected = []
    for n, source, offset in zip(range(16, 24), *plan.sampler().samples(16, 24)[::2], strict=True):
        if source == 0:
            expected.append(how.apply(streams[0].read(16 * offset, 16 * offset + 17), 0, n).tolist())
    assert alone[0] == sorted(expected) and any(1000 in row for row in alone[0])


def test_the_marks_are_the_tokenizers(tmp_path: Path) -> None:
    names = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    train_byte_level_bpe(["a text of some words", "and another one"], str(tmp_path / "with"), 270, names)
    train_byte_level_bpe(["a text of some words", "and another one"], str(tmp_path / "without"), 270)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(tmp_path / "with"))
    code = Source(name="code", language="en", kind="code")
    text = Source(name="text", language="en", fim_rate=0.1)
    plain = Source(name="plain", language="en")
    spared = Source(name="spared", language="en", kind="code", fim_rate=0.0)
    made = make_infilling(
        DataConfig(sources=[code, text, plain, spared], fim_rate=0.5, fim_spm_rate=0.25), tokenizer, 9
    )
    assert made == Infilling(0, 1, 2, 3, (0.5, 0.1, 0.0, 0.0), 0.25, 9)
    assert make_infilling(DataConfig(sources=[plain], fim_rate=0.5), tokenizer, 9) is None
    lacking = load_tokenizer("HuggingFaceTokenizer", str(tmp_path / "without"))
    with pytest.raises(TokenizerError, match="no token '<fim_prefix>' for fim_prefix_token, .*--special-tokens"):
        make_infilling(DataConfig(sources=[code], fim_rate=0.5), lacking, 9)
    assert make_infilling(DataConfig(sources=[code]), lacking, 9) is None
    for data, said in (
        (DataConfig(fim_rate=1.5), r"fim_rate \(1.5\) must lie between 0 and 1"),
        (DataConfig(fim_spm_rate=-1), "fim_spm_rate"),
        (DataConfig(sources=[Source(name="x", language="en", fim_rate=2)]), "source 'x': fim_rate"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_infilling(data, tokenizer, 9)
