"""JSONL to token files: the same bytes for any number of workers, and a clear line for whatever is wrong."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megapoly.data import encode, text_input
from megapoly.data.indexed import IndexedDataset
from megapoly.data.preprocess import is_held_out, preprocess, read_lines
from megapoly.data.text_input import Chunk, Limits, Position, Wanted
from megapoly.errors import DataError
from megapoly.tokenizer.load import load_tokenizer
from megapoly.tokenizer.train import train_sentencepiece

ROOT = Path(__file__).parents[2]
TYPE = "SentencePieceTokenizer"
TEXTS = [f"document {i} says: 안녕 {'word ' * (i % 7)}\n{i * i}" for i in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    train_sentencepiece(TEXTS, path, 300)
    return path


def lines(documents: Sequence[Mapping[str, object]]) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]))
    return str(tmp_path / "a.jsonl")


def read(prefix: Path | str) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def outputs(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if "document" in name)


def test_documents_keep_their_order_and_end_with_eod(tmp_path: Path, model: str, source: str) -> None:
    summary = preprocess([source], str(tmp_path / "p"), TYPE, model, append_eod=True)
    tokenizer = load_tokenizer(TYPE, model)
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS]
    assert read(tmp_path / "p_text_document") == expected
    flat = np.concatenate([np.array(ids, dtype="<u2") for ids in expected])
    assert (tmp_path / "p_text_document.bin").read_bytes() == flat.tobytes()
    assert (summary.documents, summary.tokens) == (60, len(flat))
    assert summary.text_bytes == sum(len(text.encode()) for text in TEXTS)
    without = preprocess([source], str(tmp_path / "q"), TYPE, model)
    assert without.tokens == len(flat) - 60


def test_workers_and_batches_do_not_change_a_byte(
    tmp_path: Path, model: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 300)
    for name, workers in (("one", 1), ("two", 2)):
        preprocess([source], str(tmp_path / name), TYPE, model, workers=workers, valid_fraction=0.3)
    for kind in ("text_document.bin", "text_document.idx", "valid_text_document.bin", "valid_text_document.idx"):
        assert (tmp_path / f"one_{kind}").read_bytes() == (tmp_path / f"two_{kind}").read_bytes()


def test_held_out_documents_are_chosen_by_id_alone(tmp_path: Path, model: str) -> None:
    names = [f"n{i}" for i in range(300)]
    for language in ("xx", "yy"):
        documents = [{"id": name, "text": f"{language} {name}"} for name in names]
        (tmp_path / f"{language}.jsonl").write_bytes(lines(documents))
        preprocess([str(tmp_path / f"{language}.jsonl")], str(tmp_path / language), TYPE, model, valid_fraction=0.12)
    tokenizer = load_tokenizer(TYPE, model)
    sides = [
        {tokenizer.decode(ids)[3:] for ids in read(tmp_path / f"{language}_valid_text_document")}
        for language in ("xx", "yy")
    ]
    assert sides[0] == sides[1] == {name for name in names if is_held_out(name, 0.12)}
    assert 15 < len(sides[0]) < 60
    assert len(read(tmp_path / "xx_text_document")) == 300 - len(sides[0])
    assert is_held_out("n1", 1.0) and not is_held_out("n1", 0.0)


def test_no_held_out_document_leaves_no_stale_file(tmp_path: Path, model: str, source: str) -> None:
    preprocess([source], str(tmp_path / "p"), TYPE, model, valid_fraction=0.3)
    name = next(f"k{i}" for i in range(99) if not is_held_out(f"k{i}", 0.3))
    (tmp_path / "b.jsonl").write_bytes(lines([{"id": name, "text": "alone"}]))
    preprocess([str(tmp_path / "b.jsonl")], str(tmp_path / "p"), TYPE, model, valid_fraction=0.3)
    assert outputs(tmp_path) == ["p_text_document.bin", "p_text_document.idx"]


def test_several_keys_make_several_outputs(tmp_path: Path, model: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "one", "title": "two"}, {"text": "", "title": "three"}]))
    summary = preprocess(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "p"), TYPE, model, append_eod=True, json_keys=["text", "title"]
    )
    assert (len(read(tmp_path / "p_text_document")), len(read(tmp_path / "p_title_document"))) == (1, 2)
    assert (summary.documents, summary.empty) == (1, 1)


BAD = {
    "malformed JSON": [b'{"text": "a"', b"nonsense", b"[" * 100000, b'{"text": ' + b"9" * 5000 + b"}"],
    "missing key": [b'{"body": "a"}'],
    "wrong type": [b'{"text": 3}', b'{"text": null}', b'["a"]', b"7"],
    "invalid UTF-8": [b'{"text": "\xff"}', b'{"text": "\\ud800"}'],
}
BAD_LINES = [(kind, line) for kind, bad in BAD.items() for line in bad]


@pytest.mark.parametrize(("kind", "bad"), BAD_LINES, ids=lambda value: str(value)[:20])
def test_a_bad_line_is_named_and_leaves_nothing(tmp_path: Path, model: str, kind: str, bad: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "good"}]) + b"\n" + bad + b"\n" + lines([{"text": "good"}]))
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: ") as caught:
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), TYPE, model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert os.listdir(tmp_path) == ["a.jsonl"]
    summary = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), TYPE, model, on_bad_line="skip")
    assert (summary.documents, summary.bad_lines) == (2, {kind: 1})
    assert f"1 bad lines ({kind}: 1)" in str(summary)


def tool(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def test_the_tool_exits_2_with_one_line_and_no_hang(tmp_path: Path, model: str, source: str) -> None:
    flags = ["--output-prefix", str(tmp_path / "p"), "--tokenizer-type", TYPE, "--tokenizer-model", model]
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": "good"}] * 5000) + b"oops\n" + lines([{"text": "x"}] * 5000))
    done = tool("--input", source, str(tmp_path / "b.jsonl"), "--workers", "2", *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "b.jsonl, line 5001: malformed JSON" in done.stderr
    assert outputs(tmp_path) == []
    done = tool("--input", source, "--append-eod", *flags)
    assert done.returncode == 0 and "60 documents" in done.stdout and "bytes per token" in done.stdout


@pytest.mark.parametrize("kind", ["gz", "zst", "zst of two frames"])
def test_compressed_input_is_the_same_text(tmp_path: Path, model: str, source: str, kind: str) -> None:
    content = Path(source).read_bytes()
    path = tmp_path / ("b.jsonl.gz" if kind == "gz" else "b.jsonl.zst")
    if kind == "gz":
        path.write_bytes(gzip.compress(content))
    elif kind == "zst":
        path.write_bytes(zstandard.compress(content))
    else:
        path.write_bytes(zstandard.compress(content[:1000]) + zstandard.compress(content[1000:]))
    assert list(read_lines(str(path))) == list(read_lines(source))
    whole = path.read_bytes()
    step = max(1, len(whole) // 40)
    for size in range(step, len(whole) - 1, step):
        if kind == "zst of two frames" and size == len(zstandard.compress(content[:1000])):
            continue
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="damaged or truncated"):
            list(read_lines(str(path)))
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged or truncated"):
        list(read_lines(str(path)))


def test_a_truncated_archive_leaves_nothing(tmp_path: Path, model: str, source: str) -> None:
    cut = tmp_path / "b.jsonl.zst"
    cut.write_bytes(zstandard.compress(Path(source).read_bytes())[:-20])
    with pytest.raises(DataError, match=r"b\.jsonl\.zst"):
        preprocess([source, str(cut)], str(tmp_path / "p"), TYPE, model)
    assert outputs(tmp_path) == []


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a":1}\n\n  \n{"b":\x85 2}\r\nlast')
    assert list(read_lines(str(tmp_path / "a.jsonl"))) == [(1, b'{"a":1}'), (4, b'{"b":\x85 2}\r'), (5, b"last")]
    with pytest.raises(DataError, match="line 4: is over 8 bytes long"):
        list(read_lines(str(tmp_path / "a.jsonl"), Limits(line_bytes=8)))


def test_missing_input_and_no_documents_are_one_line(tmp_path: Path, model: str) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for path, words in (
        (tmp_path / "none.jsonl", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "empty.jsonl", "no documents"),
    ):
        with pytest.raises(DataError, match=words):
            preprocess([str(path)], str(tmp_path / "p"), TYPE, model)
    assert os.listdir(tmp_path) == ["empty.jsonl"]
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "good"}]))
    with pytest.raises(DataError, match="cannot be written"):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "file" / "p"), TYPE, model)


def test_a_worker_that_dies_does_not_hang_the_parent(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": text} for text in TEXTS] * 20))
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 1000)

    def kill_a_worker(_: str) -> None:
        if children := multiprocessing.active_children():  # there are none yet when the first line is said
            os.kill(int(children[0].pid or 0), signal.SIGKILL)
            time.sleep(0.3)

    start = time.monotonic()
    with pytest.raises(DataError, match="worker process died"):
        preprocess(
            [str(tmp_path / "a.jsonl")], str(tmp_path / "p"), TYPE, model, workers=2, log_interval=50, log=kill_a_worker
        )
    assert time.monotonic() - start < 20
    assert outputs(tmp_path) == [] and multiprocessing.active_children() == []


def test_reading_waits_for_writing(model: str) -> None:
    read_so_far = written = 0

    def chunks() -> Iterator[Chunk]:
        nonlocal read_so_far
        for i in range(100):
            read_so_far += 1
            yield Chunk("x", i + 1, b'{"text": "word"}\n', Position(0, 0, i + 1))

    job = encode.Job(TYPE, model, "sentencepiece", (), (), (), 0.0, Wanted())
    for batch in encode.encode_chunks(job, load_tokenizer(TYPE, model), chunks(), 2):
        written += 1
        assert batch.end.lines == written
        assert read_so_far - written <= 2 * encode.CHUNKS_IN_FLIGHT
    assert written == 100


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("workers", 0),
        ("valid_fraction", 1.0),
        ("valid_fraction", float("nan")),
        ("on_bad_line", "ignore"),
        ("max_line_bytes", 0),
        ("max_expansion", 0.5),
        ("json_keys", []),
        ("json_keys", ["text", "text"]),
        ("json_keys", ["a/b"]),
        ("json_keys", [".text"]),
        ("json_keys", [""]),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, model: str, option: str, value: object) -> None:
    named = {"max_line_bytes": r"--max-line-mib \(0\)", "max_expansion": r"--max-expansion \(0\.5\)"}
    with pytest.raises(DataError, match=named.get(option, option)):
        preprocess(["x"], str(tmp_path / "new" / "p"), TYPE, model, **{option: value})  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_key_must_not_have_the_name_of_held_out_text(tmp_path: Path, model: str, source: str) -> None:
    with pytest.raises(DataError, match="PREFIX_valid_text_document"):
        preprocess([source], str(tmp_path / "p"), TYPE, model, json_keys=["text", "valid_text"], valid_fraction=0.1)


def test_no_documents_says_what_there_was(tmp_path: Path, model: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": ""}] * 3) + b"oops\n")
    with pytest.raises(DataError, match=r"a\.jsonl: no documents to write \(3 empty, 1 bad lines\); give files"):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), TYPE, model, on_bad_line="skip")
