"""A long text goes to the library in pieces: with the ids of the whole, and only where that is sure."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from megapoly.tokenizer import batch
from megapoly.tokenizer.batch import PROBES, LibraryEncoder, pieces_of
from megapoly.tokenizer.load import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megapoly.tokenizer.train import train_byte_level_bpe, train_sentencepiece

TEXTS = [
    f"text {i}: 안녕 세계 hello world, don't!\n{i * 37} {'ab' * (i % 9)}\nand so on。中文，日本語 e\u0301\n"
    for i in range(300)
]
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *PROBES,
            *TEXTS[:3],
            "a b",
            "a\nb",
            "한 글",
            "e\u0301 e\u0301",
            "a\u0301",
            "字，字",
            "字。字",
            "<unk>",
            "<|x y|>",
        ]
    ),
    st.text("ab é\u0301\n ，。、한\u1100\u1161'_1.", max_size=20),
)


@pytest.fixture(scope="module", params=["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "SentencePieceTokenizer":
        train_sentencepiece(TEXTS, str(folder / "t.model"), 330)
        return load_tokenizer(request.param, str(folder / "t.model"))
    train_byte_level_bpe(TEXTS, str(folder / "tokenizer.json"), 400)
    return load_tokenizer(request.param, str(folder / "tokenizer.json"))


def cuts(tokenizer: Tokenizer) -> bool:
    """Whether the encoder hands over a long text in pieces."""
    encoder = LibraryEncoder(tokenizer)
    sizes: list[int] = []
    encode = encoder._encode
    encoder._encode = lambda text: (sizes.append(len(text)), encode(text))[1]
    text = "\n".join(["word word", "word word"] * batch.LONG_CHARACTERS)[: 3 * batch.LONG_CHARACTERS]
    ids = encoder.encode([text], [text.encode()])[0]
    assert ids.tolist() == encode(text) and sum(sizes) == len(text)
    return max(sizes) < 1.1 * batch.LONG_CHARACTERS


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS, max_size=12), size=st.integers(1, 9))
def test_pieces_have_the_ids_of_the_whole(tokenizer: Tokenizer, words: list[str], size: int) -> None:
    text = "".join(words)
    pieces = list(pieces_of(text, size))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
    assert tokenizer.encode(text) == LibraryEncoder(tokenizer).encode([text], [text.encode()])[0].tolist()


def test_a_long_text_is_cut(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "LONG_CHARACTERS", 2000)
    assert cuts(tokenizer)


def test_a_unigram_model_gets_texts_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "LONG_CHARACTERS", 2000)
    train_sentencepiece(TEXTS, str(tmp_path / "u.model"), 300, model_type="unigram")
    assert not cuts(load_tokenizer("SentencePieceTokenizer", str(tmp_path / "u.model")))


def add(token: AddedToken) -> Callable[[tokenizers.Tokenizer], object]:
    return lambda t: t.add_special_tokens([token])


def with_prefix_space(t: tokenizers.Tokenizer) -> None:
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def without_words(t: tokenizers.Tokenizer) -> None:
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    "change",
    [
        add(AddedToken("<s t>")),
        add(AddedToken("<e>", rstrip=True)),
        add(AddedToken("<e>", lstrip=True)),
        with_prefix_space,
        without_words,
        lambda t: setattr(t, "normalizer", normalizers.Prepend("_")),
        lambda t: setattr(t, "normalizer", normalizers.Strip()),
    ],
)
def test_a_tokenizer_that_may_join_pieces_gets_texts_whole(
    change: Callable[[tokenizers.Tokenizer], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "LONG_CHARACTERS", 2000)
    file = str(tmp_path / "tokenizer.json")
    train_byte_level_bpe(TEXTS, file, 400)
    assert cuts(HuggingFaceTokenizer(file))
    changed = tokenizers.Tokenizer.from_file(file)
    change(changed)
    changed.save(file)
    assert not cuts(HuggingFaceTokenizer(file))


@pytest.mark.parametrize("end", ["\n", " ", "，", "。"])
def test_a_vocabulary_of_lines_gets_texts_whole(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "LONG_CHARACTERS", 2000)
    lines = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(r"\d"), "isolated")
    lines.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines.train_from_iterator(
        [f"word{end}word{end}" * 9] * 9,
        trainers.BpeTrainer(vocab_size=276, special_tokens=["</s>"], initial_alphabet=alphabet),
    )
    lines.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(str(tmp_path / "tokenizer.json"))
    assert [i for i in tokenizer.encode(f"word{end}word") if i not in tokenizer.encode("word")] != []
    assert not cuts(tokenizer)


def test_a_piece_across_the_border_is_seen(tmp_path: Path) -> None:
    train_sentencepiece(TEXTS, str(tmp_path / "t.model"), 330)
    tokenizer = SentencePieceTokenizer(str(tmp_path / "t.model"))
    assert tokenizer.keeps_words_apart()
    tokenizer._processor = _Changed(tokenizer._processor, tokenizer.vocab_size - 1, "a\u2581b")
    assert not tokenizer.keeps_words_apart()


class _Changed:
    """A SentencePiece model of which one piece is another."""

    def __init__(self, processor: object, changed: int, piece: str) -> None:
        self._processor, self._changed, self._piece = processor, changed, piece

    def id_to_piece(self, i: int) -> str:
        return self._piece if i == self._changed else self._processor.id_to_piece(i)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._processor, name)
