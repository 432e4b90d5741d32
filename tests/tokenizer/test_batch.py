"""Backends: gigatoken is taken where its ids are the library's, and nowhere else; its memory stays bounded."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data.encode import frame_documents
from megapoly.data.indexed import IndexedDataset
from megapoly.data.preprocess import preprocess
from megapoly.errors import DataError, TokenizerError
from megapoly.tokenizer import batch
from megapoly.tokenizer.batch import Encoder, GigatokenEncoder, LibraryEncoder, choose_backend, make_encoder
from megapoly.tokenizer.load import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megapoly.tokenizer.train import train_byte_level_bpe, train_sentencepiece

ROOT = Path(__file__).parents[2]
TEXTS = [f"text {i}: 안녕 세계 hello world, don't! {i * 37} {'ab' * (i % 9)}\n" for i in range(300)]


@pytest.fixture(scope="module", params=["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "SentencePieceTokenizer":
        train_sentencepiece(TEXTS, str(folder / "t.model"), 290)
        return load_tokenizer(request.param, str(folder / "t.model"))
    train_byte_level_bpe(TEXTS, str(folder / "tokenizer.json"), 400)
    return load_tokenizer(request.param, str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def chosen(tokenizer: Tokenizer) -> Encoder:
    name, unlike, why = choose_backend("auto", tokenizer, TEXTS)
    assert (name, why) == ("gigatoken", "")
    return make_encoder(name, tokenizer, unlike)


def encode(encoder: Any, texts: Sequence[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(texts, [text.encode() for text in texts])
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []


WORDS = st.one_of(st.text(max_size=60), st.sampled_from([*batch.PROBES, "<s>", "</s>", "<unk>", "<|endoftext|>"]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(WORDS, max_size=4).map("".join), max_size=5))
def test_the_chosen_backend_gives_the_library_s_ids(tokenizer: Tokenizer, chosen: Encoder, texts: list[str]) -> None:
    assert encode(chosen, texts) == [tokenizer.encode(text) for text in texts]
    assert encode(LibraryEncoder(tokenizer), texts) == [tokenizer.encode(text) for text in texts]


def wrong_ids(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Let gigatoken give wrong ids for texts with this word."""
    original = GigatokenEncoder.encode

    def encode(self: GigatokenEncoder, texts: Sequence[str], utf8: Sequence[bytes]) -> batch.Ids:
        ids, lengths = original(self, texts, utf8)
        ids = np.array(ids)
        for i, end in enumerate(np.cumsum(lengths)):
            if word in texts[i]:
                ids[end - 1] ^= 1
        return ids, lengths

    monkeypatch.setattr(GigatokenEncoder, "encode", encode)


def test_other_ids_are_never_taken(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    own = LibraryEncoder(tokenizer).name
    wrong_ids(monkeypatch, "text 17:")
    assert choose_backend("auto", tokenizer, TEXTS[:17])[0] == "gigatoken"
    name, _, why = choose_backend("auto", tokenizer, TEXTS)
    assert name == own and "other ids" in why and "text 17:" in why
    with pytest.raises(TokenizerError, match=f"gigatoken: it gives other ids .*; give {own}"):
        choose_backend("gigatoken", tokenizer, TEXTS)


def test_hard_cases_are_tried_without_a_sample(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_ids(monkeypatch, "שלום")
    assert choose_backend("auto", tokenizer, [])[0] == LibraryEncoder(tokenizer).name


def test_a_difference_in_the_middle_of_a_run_ends_it(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megapoly.data import text_input

    wrong_ids(monkeypatch, "unheard of")
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 1000)
    lines = [json.dumps({"text": text}) for text in [*TEXTS * 4, "unheard of " * 80, *TEXTS]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl, lines \d+ to \d+: gigatoken gives other ids than"):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), tokenizer.tokenizer_type, tokenizer.path)


def test_without_gigatoken_the_library_serves(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    find = batch.importlib.util.find_spec
    monkeypatch.setattr(batch.importlib.util, "find_spec", lambda name: None if name == "gigatoken" else find(name))
    name, _, why = choose_backend("auto", tokenizer, [])
    assert name == LibraryEncoder(tokenizer).name and "not installed" in why
    with pytest.raises(TokenizerError, match="not installed"):
        choose_backend("gigatoken", tokenizer, [])


def test_backends_that_cannot_be_meant_are_refused(tokenizer: Tokenizer) -> None:
    own = LibraryEncoder(tokenizer).name
    other = ({"sentencepiece", "tokenizers"} - {own}).pop()
    assert choose_backend(own, tokenizer, TEXTS) == (own, (), "")
    with pytest.raises(TokenizerError, match=f"{other} cannot read a {tokenizer.tokenizer_type}; give {own}"):
        choose_backend(other, tokenizer, TEXTS)
    with pytest.raises(TokenizerError, match="'fast' is unknown; known: auto, "):
        choose_backend("fast", tokenizer, TEXTS)


def test_a_model_that_gigatoken_cannot_read_is_left_to_its_library(tmp_path: Path) -> None:
    train_sentencepiece(TEXTS, str(tmp_path / "u.model"), 294, model_type="unigram")
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(tmp_path / "u.model"))
    name, _, why = choose_backend("auto", tokenizer, TEXTS)
    assert name == "sentencepiece" and why


def test_words_are_forgotten_when_memory_grows(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, loads = [100], []
    monkeypatch.setattr(batch, "_resident_bytes", lambda: resident[0])
    monkeypatch.setattr(batch, "CHECK_BYTES", 1)
    monkeypatch.setattr(batch, "CACHE_BYTES", 50)
    load = GigatokenEncoder._load
    monkeypatch.setattr(GigatokenEncoder, "_load", lambda self: (loads.append(resident[0]), load(self))[1])
    encoder = GigatokenEncoder(tokenizer)
    for grown in (100, 100, 120, 150, 151, 151, 160, 230):
        resident[0] = grown
        assert encode(encoder, ["hello world"]) == [tokenizer.encode("hello world")]
    assert loads == [100, 151, 230]


def test_neither_torch_nor_cuda_is_imported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    code = (
        "import runpy, sys; sys.path.insert(0, '.')\n"
        "runpy.run_path('tools/preprocess_data.py', run_name='__main__')\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(str(loaded & {'torch', 'triton', 'transformers', 'nvidia', 'cupy', 'numba', 'pyarrow', 'awkward'} or '') or None)\n"
    )
    flags = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "p"), "--tokenizer-type",
             tokenizer.tokenizer_type, "--tokenizer-model", tokenizer.path, "--tokenizer-backend", "gigatoken"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "(gigatoken)" in done.stdout
    assert os.path.exists(tmp_path / "p_text_document.idx")


def test_special_tokens_frame_each_document_on_request(tmp_path: Path) -> None:
    train_byte_level_bpe(TEXTS, str(tmp_path / "tokenizer.json"), 400)
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", own.token_to_id("<|endoftext|>"))]
    )
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["", *TEXTS]))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.frame() == ([tokenizer.eod], [])
    for include in (True, False):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), "HuggingFaceTokenizer", str(tmp_path),
                   append_eod=True, include_special_tokens=include)  # fmt: skip
        dataset = IndexedDataset(str(tmp_path / "p_text_document"))
        expected = [[*own.encode(text, add_special_tokens=include).ids, tokenizer.eod] for text in TEXTS]
        assert [dataset[i].tolist() for i in range(len(dataset))] == expected


@given(
    st.lists(st.integers(0, 5), max_size=20),
    st.lists(st.integers(0, 9), max_size=2),
    st.lists(st.integers(0, 9), max_size=2),
)
def test_frames_stand_around_documents_with_tokens(lengths: list[int], before: list[int], after: list[int]) -> None:
    parts = [[100 + i] * length for i, length in enumerate(lengths)]
    ids = np.array([x for part in parts for x in part], dtype=np.uint16)
    out, sizes = frame_documents(ids, np.array(lengths, dtype=np.int64), tuple(before), tuple(after))
    framed = [[*before, *part, *after] if part else [] for part in parts]
    assert out.tolist() == [x for part in framed for x in part]
    assert sizes.tolist() == [len(part) for part in framed]
