"""AutoTokenizer on an export gives the ids that training saw."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import CASES, make_reader, random_parameters
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megapoly.errors import TokenizerError
from megapoly.hf.export import export
from megapoly.sections import ModelConfig
from megapoly.tokenizer.load import HuggingFaceTokenizer, load_tokenizer
from megapoly.tokenizer.train import train_byte_level_bpe, train_sentencepiece

CORPUS = Path(__file__).parents[2] / "examples" / "data"
VOCAB = 3000
LANGUAGES = sorted(path.stem for path in CORPUS.glob("*.jsonl"))
TEXTS = {
    language: [json.loads(line)["text"] for line in (CORPUS / f"{language}.jsonl").open(encoding="utf-8")]
    for language in LANGUAGES
}
TRICKY = [
    "", " ", "    ", " a", "a ", "a  b", "\n", "\n\n a\n", "\t",
    "\r\n", "2024-10-31 0007 ٣٤ 一二", "😀👨‍👩‍👧🇰🇷", "▁a▁▁",
    "e\u0301 \u0301", "\u00a0x\u3000y", "\ufeffx", "aaaaaaaa", "ababababa", "<0x0A>", "def f():\n    return 1\n",
]  # fmt: skip

words = st.sampled_from([word for texts in TEXTS.values() for text in texts for word in text.split()[:40]])
spaces = st.sampled_from([" ", "  ", "\n", "\n    ", "\t", "", "0", "19", "😀", "é", "\u200d"])
mixed_text = st.lists(st.one_of(words, spaces, st.text(max_size=4)), max_size=12).map("".join)


def train(path: Path, **options: Any) -> None:
    texts = [line for texts in TEXTS.values() for text in texts for line in text.split("\n")]
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=writer, vocab_size=VOCAB, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=-1, minloglevel=3,
        character_coverage=0.98, **options,
    )  # fmt: skip
    path.write_bytes(writer.getvalue())


def exported(folder: Path, tokenizer_path: Path, family: str, tokenizer_type: str) -> Path:
    model: ModelConfig = CASES[family]
    reader = make_reader(model, random_parameters(model, VOCAB), VOCAB, tokenizer_path, tokenizer_type)
    return export(reader, folder / "export")


@pytest.fixture(scope="module", params=["gpt2-tied", "neox-parallel", "llama-gqa"])
def own_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    """A model of our trainer, exported beside weights of each family: each has tokenizer classes of its own."""
    folder = tmp_path_factory.mktemp("own")
    texts = [text for texts in TEXTS.values() for text in texts]
    train_sentencepiece(texts, str(folder / "t.model"), VOCAB, character_coverage=0.98)
    target = exported(folder, folder / "t.model", request.param, "SentencePieceTokenizer")
    return load_tokenizer("SentencePieceTokenizer", str(folder / "t.model")), target


def assert_same_ids(ours: object, theirs: PreTrainedTokenizerBase, text: str) -> None:
    ids = ours.encode(text)  # type: ignore[attr-defined]
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)  # type: ignore[attr-defined]


def test_ids_of_18_languages_and_of_tricky_texts(own_kind: tuple[object, Path]) -> None:
    ours, folder = own_kind
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(LANGUAGES) == 18
    for text in [*TRICKY, *(text[:3000] for texts in TEXTS.values() for text in texts)]:
        assert_same_ids(ours, theirs, text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.model_max_length == 32
    assert (folder / "tokenizer.model").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, PreTrainedTokenizerBase]:
    """A model as of LLaMA: a space before every text, which leading spaces and added symbols must not disturb."""
    folder = tmp_path_factory.mktemp("prefixed")
    train(folder / "t.model", model_type="bpe", add_dummy_prefix=True, user_defined_symbols=["<|user|>"])
    target = exported(folder, folder / "t.model", "gpt2-tied", "SentencePieceTokenizer")
    return load_tokenizer("SentencePieceTokenizer", str(folder / "t.model")), AutoTokenizer.from_pretrained(target)


@settings(max_examples=150, deadline=None)
@given(text=mixed_text)
def test_any_text_has_the_same_ids(prefixed: tuple[object, PreTrainedTokenizerBase], text: str) -> None:
    assert_same_ids(*prefixed, text)


@pytest.mark.parametrize("text", [*TRICKY, "a<|user|>b", "<|user|> b", "a <|user|>\n<|user|>b"])
def test_a_prefix_space_comes_once_and_before_leading_spaces(
    prefixed: tuple[object, PreTrainedTokenizerBase], text: str
) -> None:
    assert_same_ids(*prefixed, text)


def test_unigram_models_have_the_same_ids(tmp_path: Path) -> None:
    train(tmp_path / "t.model", model_type="unigram", add_dummy_prefix=True)
    target = exported(tmp_path, tmp_path / "t.model", "llama-gqa", "SentencePieceTokenizer")
    ours = load_tokenizer("SentencePieceTokenizer", str(tmp_path / "t.model"))
    theirs = AutoTokenizer.from_pretrained(target)
    for text in [*(t for t in TRICKY if t != "<0x0A>"), *(texts[0] for texts in TEXTS.values())]:
        assert_same_ids(ours, theirs, text)


@pytest.mark.parametrize("family", ["gpt2-tied", "neox-parallel", "llama-gqa"])
def test_a_hugging_face_tokenizer_is_copied_without_its_code(tmp_path: Path, family: str) -> None:
    source = tmp_path / "source"
    train_byte_level_bpe((text for texts in TEXTS.values() for text in texts[:3]), str(source), 600)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["code.Evil", None]}, "tokenizer_class": "GPT2Tokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "code.py").write_text("raise SystemExit")
    target = exported(tmp_path, source, family, "HuggingFaceTokenizer")
    ours, theirs = HuggingFaceTokenizer(str(source)), AutoTokenizer.from_pretrained(target)
    for text in [*TRICKY, *(texts[0] for texts in TEXTS.values())]:
        assert_same_ids(ours, theirs, text)
    assert theirs.eos_token == "<|endoftext|>"
    assert json.loads((target / "config.json").read_text())["eos_token_id"] == ours.eod
    assert "auto_map" not in (target / "tokenizer_config.json").read_text()
    assert not (target / "code.py").exists()


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "t.model", model_type="bpe")
    model = CASES["gpt2-tied"]
    reader = make_reader(model, random_parameters(model, 99), 99, tmp_path / "t.model")
    with pytest.raises(TokenizerError, match=r"t\.model: 3000 entries exceed the model's vocabulary of 99"):
        export(reader, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"], "a failed export leaves nothing behind"
