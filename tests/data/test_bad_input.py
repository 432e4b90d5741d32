"""Bytes that are altered or cut: one clear error or a counted skip, and never other tokens than the text has."""

import gzip
import json
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapoly.data import documents
from megapoly.data.clean.pipeline import clean_corpus
from megapoly.data.documents import read_documents
from megapoly.data.indexed import IndexedDataset
from megapoly.data.preprocess import preprocess
from megapoly.errors import DataError
from megapoly.tokenizer.load import Tokenizer, load_tokenizer
from megapoly.tokenizer.train import train_sentencepiece

TYPE = "SentencePieceTokenizer"
TEXTS = [f'text {i} 안녕 <s> \x00 \\ " \U0001f600 {"word " * (i % 5)}' for i in range(25)]
SLOW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# (place, byte that is put there; None cuts the rest off)
DAMAGE = st.lists(st.tuples(st.floats(0, 0.9999), st.one_of(st.none(), st.integers(0, 255))), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    train_sentencepiece(TEXTS, path, 300)
    return load_tokenizer(TYPE, path)


def jsonl() -> bytes:
    return b"".join(json.dumps({"id": i, "text": text, "lang": "ko"}).encode() + b"\n" for i, text in enumerate(TEXTS))


def damaged(content: bytes, damage: list[tuple[float, int | None]]) -> bytes:
    changed = bytearray(content)
    for place, byte in damage:
        at = int(place * len(changed))
        changed[at:] = bytes([byte, *changed[at + 1 :]]) if byte is not None and changed else b""
    return bytes(changed)


def texts_of(content: bytes) -> list[str]:
    """What a reader that knows nothing of ours takes for the documents of JSONL."""
    found = []
    for number, line in enumerate(content.split(b"\n")):
        try:
            text = json.loads(line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").decode())["text"]
            text.encode()
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        found.append(text)
    return found


def check(path: Path, tokenizer: Tokenizer, expected: list[str] | None, **options: Any) -> None:
    """Either an error of one line and no output, or exactly the tokens of these texts."""
    prefix = path.parent / "p"
    try:
        summary = preprocess(
            [str(path)], str(prefix), TYPE, tokenizer.path, on_bad_line="skip", log_interval=0, **options
        )
    except DataError as error:
        assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 500
        assert os.listdir(path.parent) == [path.name]
        return
    dataset = IndexedDataset(f"{prefix}_text_document")
    documents = [dataset[i].tolist() for i in range(len(dataset))]
    assert summary.documents == len(documents)
    if expected is not None:
        assert documents == [tokenizer.encode(text) for text in expected if text]


@SLOW
@given(DAMAGE)
def test_altered_jsonl(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, damage: list[Any]) -> None:
    path = tmp_path_factory.mktemp("x") / "a.jsonl"
    path.write_bytes(damaged(jsonl(), damage))
    check(path, tokenizer, texts_of(path.read_bytes()))


@SLOW
@given(DAMAGE)
def test_altered_gzip(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, damage: list[Any]) -> None:
    path = tmp_path_factory.mktemp("x") / "a.jsonl.gz"
    path.write_bytes(damaged(gzip.compress(jsonl()), damage))
    check(path, tokenizer, TEXTS)  # its sum tells


@SLOW
@given(DAMAGE, st.booleans())
def test_altered_zstd(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, damage: list[Any], checksum: bool
) -> None:
    path = tmp_path_factory.mktemp("x") / "a.jsonl.zst"
    path.write_bytes(damaged(zstandard.ZstdCompressor(write_checksum=checksum).compress(jsonl()), damage))
    check(path, tokenizer, TEXTS if checksum and not any(place < 0.02 for place, _ in damage) else None)


@SLOW
@given(DAMAGE, st.sampled_from(["none", "zstd"]))
def test_altered_parquet(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, damage: list[Any], compression: str
) -> None:
    path = tmp_path_factory.mktemp("x") / "a.parquet"
    pq.write_table(pa.table({"id": range(25), "text": TEXTS, "lang": ["ko"] * 25}), path, compression=compression)
    path.write_bytes(damaged(path.read_bytes(), damage))
    check(path, tokenizer, None)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bad_line_of_a_damaged_archive_is_told_as_its_damage(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def calls(path: Path) -> list[Callable[[], Any]]:
        return [
            lambda: list(read_documents([str(path)])),
            lambda: preprocess([str(path)], str(tmp_path / "p"), TYPE, tokenizer.path, log_interval=0),
            lambda: clean_corpus([str(path)], str(tmp_path / "out"), tasks=1, restart=True, log=lambda line: None),
        ]

    # The first line lies in the archive as it is: one byte makes bad UTF-8 of it, and only the sum at the end tells why.
    first = string.printable[:62].encode()
    text = b'{"text": "' + first + b'"}\n' + jsonl() + b"\n" * 3_000_000
    packed = (
        gzip.compress(text, 0) if suffix == ".gz" else zstandard.ZstdCompressor(-20, write_checksum=True).compress(text)
    )
    path = tmp_path / f"a.jsonl{suffix}"
    at = packed.index(first[10:30])
    path.write_bytes(packed[:at] + b"\xff" + packed[at + 1 :])
    for call in calls(path):
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix}: damaged or truncated at or before byte [\d,]+ of "):
            call()
    path.write_bytes(gzip.compress(b"{}\n" + text) if suffix == ".gz" else zstandard.compress(b"{}\n" + text))
    for call in calls(path):
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix}, line 1: key 'text' is missing") as caught:
            call()
        assert "-t" not in str(caught.value)
    monkeypatch.setattr(documents, "CHECKED_BYTES", 10)
    with pytest.raises(DataError, match=r"line 1: .*`(gzip|zstd) -t` tells whether"):
        calls(path)[0]()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_is_told_by_its_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = gzip.compress(jsonl()) if suffix == ".gz" else zstandard.compress(jsonl())
    path.write_bytes(whole[:200])
    with pytest.raises(DataError, match=r"truncated at or before byte 200 of 200 \("):
        list(read_documents([str(path)]))


LINES = {
    "deep": b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NUL": b'{"text": "a\x00b"}',
    "half a pair": b'{"text": "\\ud83d"}',
    "half a pair as bytes": b'{"text": "\xed\xa0\xbd"}',
    "number": b'{"text": 1e999}',
    "long number": b'{"text": ' + b"9" * 100_000 + b"}",
    "list": b'{"text": ["a"]}',
    "true": b'{"text": true}',
    "two objects": b'{"text": "a"}{"text": "b"}',
    "only a quote": b'"',
    "long": b'{"text": "' + b"a" * 2000 + b'"}',
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_no_document_is_counted(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "first"}\n' + LINES[name] + b'\n{"text": "", "lang": "ko"}\n{"text": "last"}'
    )
    limit = {"max_line_bytes": 1000} if name == "long" else {}
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*--on-bad-line skip") as caught:
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), TYPE, tokenizer.path, **limit)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400
    check(tmp_path / "a.jsonl", tokenizer, ["first", "last"], **limit)


def test_text_that_is_odd_but_text_survives(tokenizer: Tokenizer, tmp_path: Path) -> None:
    odd = ["a\x00b", "\ufeff", "\u2028\x85\x0b", "<s></s><unk>", "\U0010ffff", " \n\t ", "e\u0301", "\ufffe"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in odd))
    check(tmp_path / "a.jsonl", tokenizer, odd)
    dataset = IndexedDataset(str(tmp_path / "p_text_document"))
    assert [tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset))] == odd


def test_bad_lines_are_counted_by_language(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [{"text": "a", "lang": "KO"}, {"text": 3, "lang": "ko"}, {"lang": "en"}, {"text": "b", "lang": "x" * 99},
             {"text": "c", "lang": 7}, {"text": "", "lang": "zh-Hant"}, {"text": "d", "lang": "ko", "id": "held"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("oops\n" + "\n".join(map(json.dumps, lines)))
    summary = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), TYPE, tokenizer.path, on_bad_line="skip")
    found = {name: (c.documents, c.empty, c.bad_lines) for name, c in summary.languages.items()}
    assert found == {"ko": (2, 0, 1), "en": (0, 0, 1), "und": (2, 0, 1), "zh-hant": (0, 1, 0)}
    assert (
        sum(c.tokens for c in summary.languages.values())
        == IndexedDataset(str(tmp_path / "p_text_document")).num_tokens
    )
    table = summary.table()
    assert table[-1].split() == [
        "all",
        "4",
        "0",
        str(summary.tokens),
        f"{summary.text_bytes / summary.tokens:.2f}",
        "3",
    ]
