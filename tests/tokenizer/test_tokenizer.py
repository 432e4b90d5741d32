"""Tokenizers: every text comes back, ids are those of `transformers`, and damage ends in one line."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.errors import ConfigError, TokenizerError
from megapoly.tokenizer.fertility import Fertility, fertility, table, write_png
from megapoly.tokenizer.load import Tokenizer, load_tokenizer
from megapoly.tokenizer.train import (
    VocabularyTooLarge,
    balance_languages,
    character_coverage,
    train_byte_level_bpe,
    train_sentencepiece,
)

SP, HF = "SentencePieceTokenizer", "HuggingFaceTokenizer"
TEXTS = {
    "en": "The rain had stopped, and the street smelled of bread and wet stone.",
    "zh": "雨停了,街上飘着面包和湿石头的味道。",
    "es": "La lluvia había cesado y la calle olía a pan y a piedra mojada.",
    "fr": "La pluie avait cessé et la rue sentait le pain et la pierre mouillée.",
    "pt": "A chuva tinha parado e a rua cheirava a pão e a pedra molhada.",
    "ru": "Дождь кончился, и на улице пахло хлебом и мокрым камнем.",
    "de": "Der Regen hatte aufgehört, und die Straße roch nach Brot und nassem Stein.",
    "it": "La pioggia era cessata e la strada profumava di pane e di pietra bagnata.",
    "ar": "توقف المطر وفاحت في الشارع رائحة الخبز والحجر المبلل.",
    "ja": "雨がやみ、通りにはパンと濡れた石の匂いがした。",
    "ko": "비가 그치고 거리에서는 빵과 젖은 돌 냄새가 났다.",
    "th": "ฝนหยุดแล้ว ถนนมีกลิ่นขนมปังและหินเปียก",
    "vi": "Mưa đã tạnh, con phố thơm mùi bánh mì và đá ướt.",
    "id": "Hujan telah berhenti dan jalan itu berbau roti dan batu basah.",
    "nl": "De regen was opgehouden en de straat rook naar brood en natte steen.",
    "pl": "Deszcz ustał, a ulica pachniała chlebem i mokrym kamieniem.",
    "tr": "Yağmur durmuştu, sokak ekmek ve ıslak taş kokuyordu.",
    "he": "הגשם פסק והרחוב הריח מלחם ומאבן רטובה.",
}
PROBES = [
    *TEXTS.values(), "", " ", "  two spaces lead", "one ends ", "a\n\nb\n", "\n x", "\ttabs\t\tand  spaces",
    "12345 + 67.8 = 12412.8", "👩‍👩‍👧 🎉", "a\r\nb", "e\u0301 é ﬁ １２３", "\u00a0\u200b\u2585", "nul \0 byte",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SentencePiece model, and byte-level BPE in `hf/`."""
    path = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(TEXTS.values(), str(path / "tokenizer.model"), 800, character_coverage=1.0)
    train_byte_level_bpe(TEXTS.values(), str(path / "hf"), 500)
    return path


@pytest.fixture(scope="module", params=[SP, HF])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return load_tokenizer(request.param, str(folder / ("tokenizer.model" if request.param == SP else "hf")))


@pytest.mark.parametrize("text", PROBES)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.eod not in ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_and_digits_are_those_of_polylm(folder: Path) -> None:
    tokenizer = load_tokenizer(SP, str(folder / "tokenizer.model"))
    assert (tokenizer.eod, tokenizer.bos, tokenizer.vocab_size) == (2, 1, 800)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert [processor.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [processor.id_to_piece(i) for i in tokenizer.encode("\n")] == ["<0x0A>"]
    assert len(tokenizer.encode("2024")) == 4
    assert tokenizer.eod not in tokenizer.encode("a </s> that is spelled out")


def test_digits_are_split_even_where_they_repeat(tmp_path: Path) -> None:
    train_sentencepiece(["year 2024 after 2024 words"] * 50, str(tmp_path / "t.model"), 290)
    assert len(load_tokenizer(SP, str(tmp_path / "t.model")).encode("2024")) == 4


@pytest.mark.parametrize("text", PROBES)
def test_ids_equal_those_of_transformers(folder: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": False, "legacy": False}))
    theirs = transformers.LlamaTokenizer.from_pretrained(folder)
    ours = load_tokenizer(SP, str(folder / "tokenizer.model"))
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    assert theirs.encode(text, add_special_tokens=False) == load_tokenizer(HF, str(folder / "hf")).encode(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_and_round_trips(tmp_path: Path, model_type: str) -> None:
    for name in ("a", "b"):
        train_sentencepiece(TEXTS.values(), str(tmp_path / name), 500, model_type)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = load_tokenizer(SP, str(tmp_path / "a"))
    assert [tokenizer.decode(tokenizer.encode(text)) for text in PROBES] == PROBES


def test_byte_level_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    train_byte_level_bpe(TEXTS.values(), str(tmp_path / "t.json"), 500)
    assert (tmp_path / "t.json").read_bytes() == (folder / "hf" / "tokenizer.json").read_bytes()
    assert load_tokenizer(HF, str(tmp_path / "t.json")).eod == 0


@pytest.mark.parametrize("before", ["filler " * 20000, "a\tb\t", "▅ ", "first line\n" * 3], ids=str.split)
def test_no_training_text_is_dropped(tmp_path: Path, before: str) -> None:
    text = before + "zebrafinch " * 40
    with pytest.raises(VocabularyTooLarge) as caught:
        train_sentencepiece([text], str(tmp_path / "t.model"), 5000, character_coverage=1.0)
    train_sentencepiece([text], str(tmp_path / "t.model"), caught.value.largest, character_coverage=1.0)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert "▁zebrafinch" in processor.encode(" zebrafinch", out_type=str)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte-level"])
def test_a_vocabulary_that_is_too_large_names_the_largest(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / ("t.json" if kind == "byte-level" else "t.model"))

    def train(vocab_size: int) -> None:
        texts = ["few words make few pieces"]
        if kind == "byte-level":
            train_byte_level_bpe(texts, path, vocab_size)
        else:
            train_sentencepiece(texts, path, vocab_size, kind)

    with pytest.raises(VocabularyTooLarge) as caught:
        train(5000)
    assert str(caught.value.largest) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
    train(caught.value.largest)
    assert load_tokenizer(HF if kind == "byte-level" else SP, path).vocab_size == caught.value.largest
    with pytest.raises(TokenizerError, match=r"vocab_size \(100\) must lie between (257|260) \("):
        train(100)


@pytest.mark.parametrize("train", [train_sentencepiece, train_byte_level_bpe])
@pytest.mark.parametrize("size", [-1, 0, 1, 10_000_001, 10**30])
def test_a_vocabulary_of_no_possible_size_is_one_clear_line(tmp_path: Path, train: Any, size: int) -> None:
    with pytest.raises(TokenizerError, match=rf"vocab_size \({size}\) must") as caught:
        train(TEXTS.values(), str(tmp_path / "t"), size)
    assert "\n" not in str(caught.value) and "INTERNAL" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "name", "message"),
    [
        (
            train_sentencepiece,
            "x.json",
            r"x\.json: a SentencePiece model is one file, such as x\.model; give such a name",
        ),
        (train_sentencepiece, "", "is one file"),
        (train_byte_level_bpe, "x.model", r"x\.model: byte-level BPE has no \.model; give a \.json or directory"),
    ],
)
def test_a_name_of_the_other_kind_of_tokenizer_is_refused(tmp_path: Path, train: Any, name: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        train(iter(lambda: pytest.fail("text was read"), None), str(tmp_path / name), 1000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1000.0, -0.1])
def test_an_alpha_that_is_no_exponent_is_refused(tmp_path: Path, alpha: float) -> None:
    texts = balance_languages(lambda: [("en", "some text")], alpha)
    with pytest.raises(TokenizerError, match=r"alpha \(.*\) must lie in \[0, 1\]"):
        train_sentencepiece(texts, str(tmp_path / "t"), 300)


def test_no_text_and_a_failing_reader_are_told_apart(tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield "some text"
        raise ValueError("line 7 is bad")

    for train in (train_sentencepiece, train_byte_level_bpe):
        with pytest.raises(TokenizerError, match="no text"):
            train([], str(tmp_path / "t"), 300)
        with pytest.raises(ValueError, match="line 7 is bad"):
            train(failing(), str(tmp_path / "t"), 300)


def damaged(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_damage_ends_in_one_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = (folder / "tokenizer.model").read_bytes()
    text = (folder / "hf" / "tokenizer.json").read_bytes()
    cases = [
        (SP, damaged(tmp_path / "empty.model", b""), "damaged"),
        (SP, damaged(tmp_path / "cut.model", model[:-7]), "damaged"),
        (SP, damaged(tmp_path / "noise.model", bytes(range(256))), "damaged"),
        (SP, str(folder / "hf" / "tokenizer.json"), "HuggingFaceTokenizer"),
        (SP, str(folder), "cannot be read"),
        (SP, str(tmp_path / "absent.model"), "no such"),
        (HF, damaged(tmp_path / "cut.json", text[:-9]), "damaged"),
        (HF, damaged(tmp_path / "other.json", b"{}"), "damaged"),
        (HF, str(folder / "tokenizer.model"), "SentencePieceTokenizer"),
        (HF, str(tmp_path), "no such"),
        ("GPT2BPETokenizer", str(folder), "known: "),
    ]
    for kind, path, words in cases:
        with pytest.raises(TokenizerError, match=words) as caught:
            load_tokenizer(kind, path)
        assert "\n" not in str(caught.value), path
    assert capfd.readouterr().err == ""


SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
PLAIN: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
    "post_processor": None, "decoder": None, "added_tokens": [{"id": 0, "content": "</s>", **SPECIAL}],
    "model": {"type": "BPE", "vocab": {"</s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
}  # fmt: skip
SECOND_TEXT = {
    "type": "TemplateProcessing", "pair": [], "special_tokens": {},
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
}  # fmt: skip


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "YWJj"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"post_processor": SECOND_TEXT},
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 99}},
        {"model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "[UNK]"}},
    ],
    ids=["charsmap", "no length", "second text", "strip", "no unknown entry"],
)
def test_parts_that_load_and_cannot_be_used_are_refused(tmp_path: Path, part: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(PLAIN | part))
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json or damaged \(.+\); copy it again"):
        load_tokenizer(HF, str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps(PLAIN))
    assert load_tokenizer(HF, str(tmp_path)).encode("ab") == [3]


def test_the_end_of_document_comes_from_the_files_beside(folder: Path, tmp_path: Path) -> None:
    words = json.loads((folder / "hf" / "tokenizer.json").read_text())
    words["added_tokens"][0]["content"] = "<|stop|>"
    vocab = words["model"]["vocab"]
    vocab["<|stop|>"] = vocab.pop("<|endoftext|>")
    words["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(TokenizerError, match="no end-of-document token"):
        load_tokenizer(HF, str(tmp_path))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|stop|>"}}))
    tokenizer = load_tokenizer(HF, str(tmp_path))
    assert (tokenizer.eod, tokenizer.bos) == (0, None)
    assert tokenizer.decode(tokenizer.encode(TEXTS["en"])) == TEXTS["en"]  # truncation is off


def test_balancing_repeats_small_languages_and_loses_nothing() -> None:
    documents = [("en", f"{i:04d}" * 5) for i in range(800)] + [("ko", f"k{i:03d}" * 5) for i in range(50)]
    texts = list(balance_languages(lambda: documents, alpha=0.5))
    assert {text for _, text in documents} == set(texts)
    assert texts == list(balance_languages(lambda: documents, alpha=0.5))
    shares = Counter(text[0] == "k" for text in texts)
    assert shares[False] == 800 and shares[True] == pytest.approx(800 / (800 / 50) ** 0.5, rel=0.1)
    assert list(balance_languages(lambda: documents, alpha=1.0)) == [text for _, text in documents]
    sampled = list(balance_languages(lambda: documents, alpha=1.0, max_bytes=17 * 1000 // 4))
    assert len(sampled) == pytest.approx(850 / 4, rel=0.25)
    assert list(balance_languages(lambda: [])) == []


def test_coverage_leaves_room_for_words() -> None:
    characters = Counter({chr(0x4E00 + i): 1 for i in range(1000)})
    assert character_coverage(characters, 259 + 1980) == 0.99
    assert character_coverage(characters, 300) == 0.98
    assert character_coverage(characters, 8192) == 0.9995


def test_entries_are_found_by_name(tokenizer: Tokenizer) -> None:
    name = "</s>" if tokenizer.tokenizer_type == "SentencePieceTokenizer" else "<|endoftext|>"
    assert tokenizer.token_id(name) == tokenizer.eod
    assert tokenizer.token_id("<no such token>") is None


def test_what_text_costs_by_language(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [("x", "hello you"), ("x", "né"), ("y", ""), ("ko", "안녕")]
    found = fertility(tokenizer, lambda: documents)
    tokens = {text: len(tokenizer.encode(text)) for _, text in documents}
    of_x = tokens["hello you"] + tokens["né"]
    assert list(found) == ["ko", "x", "all"]
    assert found["x"] == Fertility(12, 11, 3, of_x) and found["ko"] == Fertility(6, 2, 1, tokens["안녕"])
    assert found["all"].tokens == sum(tokens.values()) and found["all"].bytes == 18
    assert (found["x"].bytes_per_token, found["x"].tokens_per_word) == (12 / of_x, of_x / 3)
    assert found["x"].tokens_per_character == of_x / 11
    lines = table({"one": found, "a/rather/long/name/of/a/tokenizer.model": {"x": found["x"]}}).splitlines()
    assert len({len(line) for line in lines}) == 1 and "  …/name/of/a/tokenizer.model" in lines[0]
    assert f"{12 / of_x:.2f}" in lines[3] and lines[2].split()[4] == "-"
    write_png({"one": found, "other": {"x": found["x"]}}, str(tmp_path / "f.png"))
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"none/f\.png: cannot be written: No such file"):
        write_png({"one": found}, str(tmp_path / "none/f.png"))


SPECIAL = ("<fim_prefix>", "<fim_middle>")


def test_further_special_tokens_are_no_text(tmp_path: Path) -> None:
    train_sentencepiece(TEXTS.values(), str(tmp_path / "t.model"), 500, special_tokens=SPECIAL)
    train_byte_level_bpe(TEXTS.values(), str(tmp_path / "hf"), 500, ("<|endoftext|>", *SPECIAL))
    for kind, path, ids in ((SP, "t.model", [3, 4]), (HF, "hf", [1, 2])):
        tokenizer = load_tokenizer(kind, str(tmp_path / path))
        assert [tokenizer.token_id(token) for token in SPECIAL] == ids
        assert tokenizer.vocab_size == 500 and tokenizer.eod == ids[0] - 1
    assert not {3, 4} & set(load_tokenizer(SP, str(tmp_path / "t.model")).encode("a <fim_prefix> b"))
    for wrong in (("a", "a"), (" ",), ("</s>",)):
        with pytest.raises(TokenizerError, match="special token"):
            train_sentencepiece(TEXTS.values(), str(tmp_path / "u.model"), 500, special_tokens=wrong)
    with pytest.raises(TokenizerError, match="special token"):
        train_byte_level_bpe(TEXTS.values(), str(tmp_path / "u"), 500, ("a", "a"))


def test_digits_and_form_c_of_byte_level_bpe(tmp_path: Path) -> None:
    text = ["the years 1999 1999 1999 and 2024 2024 " * 8, "caf\u00e9 caf\u00e9 " * 8]
    train_byte_level_bpe(text, str(tmp_path / "plain"), 272)
    train_byte_level_bpe(text, str(tmp_path / "both"), 272, split_digits=True, nfc=True)
    plain, both = (load_tokenizer(HF, str(tmp_path / name)) for name in ("plain", "both"))
    assert len(plain.encode("1999")) < 4 == len(both.encode("1999"))
    assert both.encode("cafe\u0301") == both.encode("caf\u00e9") != plain.encode("cafe\u0301")
    assert both.decode(both.encode("cafe\u0301 99")) == "caf\u00e9 99"
    assert plain.decode(plain.encode("cafe\u0301 99")) == "cafe\u0301 99"


def test_no_merge_crosses_a_morpheme(tmp_path: Path) -> None:
    """What separates is neither needed nor lost in text that is encoded later."""
    words, sign = ["먹었다", "갔다", "먹는다"], "\u0cf1"
    separated = "먹\u0cf1었\u0cf1다 갔\u0cf1다 먹\u0cf1는\u0cf1다 " * 40
    for name, text, mark in (("m", separated, sign), ("plain", separated.replace(sign, ""), None)):
        with pytest.raises(VocabularyTooLarge) as caught:
            train_byte_level_bpe([text], str(tmp_path / name), 5000, morpheme_separator=mark)
        train_byte_level_bpe([text], str(tmp_path / name), caught.value.largest, morpheme_separator=mark)
    tokenizer, plain = (load_tokenizer(HF, str(tmp_path / name)) for name in ("m", "plain"))
    for word in words:
        assert len(tokenizer.encode(f" {word}")) > len(plain.encode(f" {word}"))
        ends = {tokenizer.decode(tokenizer.encode(word)[: i + 1]) for i in range(len(tokenizer.encode(word)))}
        assert {word[: i + 1] for i in range(len(word))} <= ends  # every morpheme, here a syllable, ends a token
    assert tokenizer.decode(tokenizer.encode(f"a{sign}b")) == f"a{sign}b"
    for wrong in ("", "ab"):
        with pytest.raises(TokenizerError, match="must be one character"):
            train_byte_level_bpe([separated], str(tmp_path / "n"), 275, morpheme_separator=wrong)


@pytest.mark.parametrize("flag", ["--split-digits", "--nfc", "--morpheme-separator=@"])
def test_what_a_sentencepiece_model_cannot_have_is_refused(tmp_path: Path, flag: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    command = [sys.executable, str(Path(__file__).parents[2] / "tools/train_tokenizer.py"), "--vocab-size", "300"]
    files = ["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "t.model")]
    done = subprocess.run([*command, *files, flag], capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "t.model").exists()
    assert done.stderr.startswith(f"error: {flag.partition('=')[0]}: for byte-level BPE")
    assert done.stderr.count("\n") == 1 and ("bring the text into it before" in done.stderr) == (flag == "--nfc")
