"""Inputs: patterns, Parquet, bounds on lines and expansion, and that any position is one from which reading can go on."""

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import text_input
from megapoly.data.documents import BadLine, Document, documents_of, read_documents
from megapoly.data.text_input import Chunk, Limits, Position, Wanted, describe_input, expand_inputs, read_chunks
from megapoly.errors import DataError

WANTED = Wanted(("text",), "lang", skip_bad_lines=True)
SMALL = Wanted(("text",), "lang", True, Limits(line_bytes=200))


def found(chunks: list[Chunk], wanted: Wanted = WANTED) -> list[tuple[int, str]]:
    """(number, text or kind of what is bad) of all lines."""
    return [
        (number, what.texts[0] if isinstance(what, Document) else what.kind)
        for chunk in chunks
        for number, what in documents_of(chunk, wanted)
    ]


def write(path: Path, content: bytes) -> str:
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, lambda content: content)(content)
    path.write_bytes(packed)
    return str(path)


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


LINES = st.lists(
    st.one_of(
        st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
        st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")),
        st.sampled_from(
            [b"", b"  ", b"x" * 199, b"x" * 200, b"x" * 201, b"y" * 900, b'{"text": "' + b"z" * 188 + b'"}']
        ),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(LINES, st.integers(1, 400), st.booleans(), st.sampled_from([".jsonl", ".gz", ".zst"]))
def test_chunks_of_any_size_hold_the_same_lines_and_can_be_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int, ends: bool, suffix: str
) -> None:
    path = write(tmp_path_factory.mktemp("x") / f"a{suffix}", b"\n".join(lines) + (b"\n" if ends else b""))
    expected = []
    for number, line in enumerate(b"\n".join(lines).split(b"\n"), 1):
        if len(line) > 200:
            expected.append((number, "line too long"))
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line and not line.isspace():
            expected += found([Chunk(path, 2, line, Position())], SMALL)
            expected[-1] = (number, expected[-1][1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_input, "CHUNK_BYTES", size)
        chunks = list(read_chunks([path], SMALL))
        assert found(chunks, SMALL) == expected
        for i, chunk in enumerate(chunks):
            assert found(list(read_chunks([path], SMALL, chunk.end)), SMALL) == found(chunks[i + 1 :], SMALL)


def test_patterns_are_sorted_and_every_file_comes_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "d[1].jsonl"):
        (tmp_path / name).write_bytes(b"{}\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "e.jsonl").write_bytes(b"{}\n")
    here = str(tmp_path)
    assert [Path(p).name for p in expand_inputs([f"{here}/*.jsonl"])] == ["a.jsonl", "b.jsonl", "d[1].jsonl"]
    assert [Path(p).name for p in expand_inputs([f"{here}/c.txt", f"{here}/**/e.jsonl"])] == ["c.txt", "e.jsonl"]
    assert expand_inputs([f"{here}/d[1].jsonl"]) == [f"{here}/d[1].jsonl"]
    os.mkfifo(tmp_path / "pipe")
    for patterns, words in (
        ([f"{here}/*.json"], "matches no file"),
        ([f"{here}/a.jsonl", f"{here}/*.jsonl"], "is given twice"),
        ([f"{here}/pipe"], "no regular file"),
        ([f"{here}/a\0.jsonl"], "no file name"),
    ):
        with pytest.raises(DataError, match=words):
            expand_inputs(patterns)


def test_parquet_is_the_same_documents(tmp_path: Path) -> None:
    texts = [f"text {i} 안녕" for i in range(200)]
    columns: dict[str, Any] = {"id": list(range(200)), "text": texts, "lang": ["ko"] * 200}
    plain = parquet(tmp_path / "a.parquet", columns, row_group_size=70)
    coded = parquet(tmp_path / "b.parquet", columns | {"text": pa.array(texts).dictionary_encode()}, compression="zstd")
    for path in (plain, coded):
        chunks = list(read_chunks([path], WANTED))
        assert found(chunks) == list(enumerate(texts, 1))
        documents = [what for chunk in chunks for _, what in documents_of(chunk, WANTED)]
        assert [(d.name, d.language) for d in documents if isinstance(d, Document)] == [
            (str(i), "ko") for i in range(200)
        ]
        for i, chunk in enumerate(chunks):
            rest = list(read_chunks([path], WANTED, chunk.end))
            assert found(rest) == [pair for later in chunks[i + 1 :] for pair in found([later])]


def test_rows_of_parquet_that_are_no_text_are_counted(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"ok\xff\xfe")]
    )
    path = parquet(tmp_path / "a.parquet", {"text": pa.chunked_array([broken, pa.array([None, "x" * 300, "good"])])})
    kinds = ["ok", "invalid UTF-8", "wrong type", "line too long", "good"]
    assert [what for _, what in found(list(read_chunks([path], SMALL)), SMALL)] == kinds
    for columns, words in (({"body": ["a"]}, "column 'text' is missing"), ({"text": [1]}, "holds int64, not strings")):
        with pytest.raises(DataError, match=words):
            list(read_chunks([parquet(tmp_path / "b.parquet", columns)], WANTED))


def test_parquet_is_read_as_lines_are(tmp_path: Path) -> None:
    records = [{"text": "a", "id": "7", "lang": "ko"}, {"text": "b", "id": "b"}]
    columns = {"text": ["a", "b"], "id": ["7", None], "lang": ["ko", None], "more": [1, 2]}
    assert list(read_documents([parquet(tmp_path / "a.parquet", columns)])) == records
    with pytest.raises(DataError, match=r"b\.parquet, line 2: column 'text' is null"):
        list(read_documents([parquet(tmp_path / "b.parquet", {"text": ["a", None]})]))


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["text", "text"], pa.array(["b"]), "has 2 columns 'text'; write it with one"),
        (["text", "id", "id"], pa.array(["b"]), "has 2 columns 'id'; write it with one"),
        (
            ["text", "id"],
            pa.array([1], pa.timestamp("ns")),
            r"column 'id' holds timestamp\[ns\] .*; write it as strings",
        ),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path: Path, names: list[str], more: Any, message: str) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), *[more] * (len(names) - 1)], names=names)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
        list(read_chunks([str(tmp_path / "a.parquet")], WANTED))


def test_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    path = Path(
        parquet(tmp_path / "a.parquet", {"text": [f"some text {i * i}" for i in range(2000)]}, row_group_size=500)
    )
    whole = path.read_bytes()
    expected = found(list(read_chunks([str(path)], WANTED)))
    for size in range(0, len(whole), max(1, len(whole) // 30)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.parquet: damaged or no Parquet") as caught:
            list(read_chunks([str(path)], WANTED))
        assert len(str(caught.value)) < 400
    path.write_bytes(whole)
    assert found(list(read_chunks([str(path)], WANTED))) == expected


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("line", [b"\n", b'{"text": "a"}\n', b"0"], ids=["blank", "documents", "one line"])
def test_a_bomb_is_bounded(tmp_path: Path, suffix: str, line: bytes) -> None:
    path = tmp_path / f"bomb{suffix}"
    piece = line * (16_000_000 // len(line))
    with gzip.open(path, "wb") if suffix == ".gz" else zstandard.open(path, "wb") as file:  # type: ignore[union-attr]
        for _ in range(8):
            file.write(piece)
    begin = time.monotonic()
    limits = Limits(line_bytes=1 << 30)
    with pytest.raises(DataError, match="expands to over 200 times its size; give a larger --max-expansion"):
        for _ in read_chunks([str(path)], Wanted(limits=limits)):
            pass
    assert time.monotonic() - begin < 30
    generous = Wanted(limits=Limits(line_bytes=1 << 30, expansion=1e6))
    assert sum(1 for _ in read_chunks([str(path)], generous)) >= 1


def test_a_bomb_of_parquet_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_input, "FREE_EXPANSION_BYTES", 1 << 20)
    path = parquet(tmp_path / "a.parquet", {"text": ["long " * 2000] * 5000})
    assert os.path.getsize(path) < 30_000
    with pytest.raises(DataError, match="expands to over 200 times"):
        list(read_chunks([path], WANTED))


def test_a_file_that_is_being_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(DataError, match="changed while it was read"):
        for _ in read_chunks([str(path)], WANTED):
            with open(path, "ab") as file:
                file.write(b'{"text": "b"}\n')
    with pytest.raises(DataError, match="changed while it was read"):
        for _ in read_chunks([str(path)], WANTED):
            os.replace(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
            path.write_bytes(b'{"text": "a"}\n' * 2)


def test_a_change_is_seen_in_the_description(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a" * 100_000)
    first = describe_input(str(path))
    assert describe_input(str(path)) == first
    times = (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns)
    path.write_bytes(b"b" + b"a" * 99_999)
    os.utime(path, ns=times)
    assert describe_input(str(path)) != first
    path.write_bytes(b"a" * 50_000 + b"b" + b"a" * 49_999)
    os.utime(path, ns=(times[0], times[1] + 1))
    assert describe_input(str(path)) != first


def test_an_endless_line_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(150):
            file.write(b"abcdefgh" * (1 << 17))
        file.write(b'"}\n{"text": "last"}\n')
    import tracemalloc

    limits = Limits(line_bytes=4 << 20, expansion=1e4)
    tracemalloc.start()
    chunks = list(read_chunks([str(path)], Wanted(("text",), "lang", True, limits)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found(chunks) == [(1, "first"), (2, "line too long"), (3, "last")]
    assert peak < 20 << 20
    assert isinstance(next(what for _, what in documents_of(chunks[1], WANTED)), BadLine)
