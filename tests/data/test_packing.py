"""Packing: whole documents in full rows by best fit, every token once, in an order that the seed alone decides."""

import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import packing
from megapoly.data.indexed import IndexedDataset
from megapoly.data.inspection import describe, inspect
from megapoly.data.mending import merge, repair
from megapoly.data.packed import PackedStream, PackNote, read_note
from megapoly.data.packing import Packing, best_fit, pack_documents
from megapoly.data.preprocess import preprocess
from megapoly.data.templates import Template
from megapoly.errors import DataError
from megapoly.tokenizer.load import load_tokenizer
from megapoly.tokenizer.train import train_sentencepiece

ROOT = Path(__file__).parents[2]
TYPE = "SentencePieceTokenizer"
U16 = np.dtype("<u2")
lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=80)


def one_by_one(sizes: list[int], capacity: int) -> Counter[int]:
    """Best-fit decreasing as its authors say it: each into the fullest row with room; rows by their fill."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(capacity - size)
    return Counter(capacity - room for room in rooms)


def write(folder: Path, lengths: list[int]) -> tuple[str, list[list[int]]]:
    """Documents that end with 0, each of tokens of its own, as preprocessing leaves them on the way."""
    documents = [[*([i + 1] * (length - 1)), 0] for i, length in enumerate(lengths)]
    np.array([token for document in documents for token in document], U16).tofile(folder / "x.bin")
    np.array(lengths, "<i4").tofile(folder / "x.lengths")
    return str(folder / "x"), documents


def rows_of(prefix: str) -> list[list[list[int]]]:
    """The texts of each row, as the index has them."""
    dataset = IndexedDataset(prefix)
    return [
        [dataset[i].tolist() for i in range(begin, end)]
        for begin, end in itertools.pairwise(dataset.document_index.tolist())
    ]


# ------------------------------------------------------------------------------------------------------- best fit


@given(st.lists(st.integers(1, 30), max_size=200), st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_rows_are_those_of_best_fit_one_by_one(sizes: list[int], capacity: int) -> None:
    sizes = [min(size, capacity) for size in sizes]
    counts = np.bincount(sizes, minlength=capacity + 1)
    row_of, rows = best_fit(counts)
    full = np.bincount(row_of, weights=np.repeat(np.arange(capacity), counts[:-1]), minlength=rows).astype(int)
    full[: counts[capacity]] += capacity
    assert len(full) == rows
    assert Counter(full.tolist()) == one_by_one(sizes, capacity)


def test_a_piece_goes_into_the_fullest_row_with_room() -> None:
    counts = np.zeros(11, int)
    counts[[7, 6, 4, 3]] = 1  # first fit would put the 3 beside the 6
    row_of, rows = best_fit(counts)
    assert (row_of.tolist(), rows) == ([0, 1, 1, 0], 2)


def test_a_million_documents_take_few_bytes_each() -> None:
    sizes = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000).astype(int) + 2, 2049)
    counts = np.bincount(sizes, minlength=2050)
    tracemalloc.start()
    row_of, rows = best_fit(counts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * len(sizes)
    full = np.bincount(row_of, weights=np.repeat(np.arange(2049), counts[:-1]), minlength=rows)
    full[: counts[2049]] += 2049
    assert full.max() <= 2049 and (sizes.sum() - rows) / rows / 2048 > 0.999


# ----------------------------------------------------------------------------------------------------- on the disk


@given(lengths_of_documents, st.integers(1, 20), st.integers(0, 2**64 - 1), st.sampled_from([64, 300, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_every_token_once_no_short_document_cut_no_row_too_long(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, seed: int, leaf: int
) -> None:
    stem, documents = write(tmp_path_factory.mktemp("x"), lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "READ_DOCUMENTS", 7)
        patch.setattr("megapoly.data.shuffle.FEW_DOCUMENTS", 3)
        patch.setattr("megapoly.data.shuffle.DOCUMENT_BYTES", 8)
        found = pack_documents(stem, U16, length, seed, leaf)
    rows, capacity = rows_of(f"{stem}.packed"), length + 1
    pieces = [text[i : i + capacity] for text in documents for i in range(0, len(text), capacity)]
    assert sorted(text for row in rows for text in row) == sorted(pieces)
    sizes = [sum(map(len, row)) for row in rows]
    assert max(sizes) <= capacity
    assert Counter(sizes) == one_by_one([len(piece) for piece in pieces], capacity)
    for row in rows:  # a row's texts come in the order of the corpus
        owners = [text[0] for text in row if text[0]]
        assert owners == sorted(owners)
    cut = sum(size > capacity for size in lengths)
    assert found == Packing(length, len(rows), sum(lengths), len(pieces), len(lengths), cut)
    assert found.fullness == pytest.approx(sum(size - 1 for size in sizes) / (len(rows) * length))
    assert {name for name in os.listdir(Path(stem).parent) if "packed" not in name} == {"x.bin", "x.lengths"}


def test_the_order_is_that_of_the_seed_and_not_of_size(tmp_path: Path) -> None:
    orders = []
    for seed, leaf in ((0, 1 << 20), (0, 4096), (1, 1 << 20)):
        folder = tmp_path / f"{seed}-{leaf}"
        folder.mkdir()
        stem, _ = write(folder, np.random.default_rng(3).integers(2, 60, 3000).tolist())
        pack_documents(stem, U16, 47, seed, leaf)
        orders.append(rows_of(f"{stem}.packed"))
    assert orders[0] == orders[1] and orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    longest = np.array([max(map(len, row)) for row in orders[0]])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.1


def test_what_an_attempt_left_is_begun_anew(tmp_path: Path) -> None:
    stem, _ = write(tmp_path, [5, 9, 3])
    expected = pack_documents(stem, U16, 10, 0)
    content = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for name in ("x.packed.bin", "x.packed.idx", "x.packed.numbers", "x.packed.rows", "x.pieces.lengths"):
        (tmp_path / name).write_bytes(b"junk" * 99)
    (tmp_path / "x.packed.buckets").mkdir()
    assert pack_documents(stem, U16, 10, 0) == expected
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == content


# ------------------------------------------------------------------------------------------------- preprocess_data.py


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(2)
    return [f"document {i} says " + "word " * int(n) for i, n in enumerate(rng.lognormal(2.2, 1.0, 150))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    train_sentencepiece(texts, path, 286)
    return path


@pytest.fixture
def source(tmp_path: Path, texts: list[str]) -> str:
    lines = [json.dumps({"id": i, "text": text, "lang": "en"}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    return str(tmp_path / "a.jsonl")


def run(source: str, prefix: Path, model: str, **changes: Any) -> dict[str, Packing]:
    options: dict[str, Any] = {"append_eod": True, "pack_length": 63, "log_interval": 0} | changes
    return preprocess([source], str(prefix), TYPE, model, **options).packings


def test_rows_of_text_are_documents_of_megatrons_index(
    tmp_path: Path, model: str, source: str, texts: list[str]
) -> None:
    made = run(source, tmp_path / "p", model)[str(tmp_path / "p_text_document")]
    tokenizer = load_tokenizer(TYPE, model)
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    pieces = sorted(text[i : i + 64] for text in expected for i in range(0, len(text), 64))
    prefix = str(tmp_path / "p_text_document")
    rows = rows_of(prefix)
    assert sorted(text for row in rows for text in row) == pieces
    assert max(sum(map(len, row)) for row in rows) <= 64 and made.fullness > 0.9
    assert (made.rows, made.documents) == (len(rows), len(texts))
    assert made.cut == sum(len(text) > 64 for text in expected) > 0
    assert read_note(prefix) == PackNote(63, len(rows), sum(map(len, expected)))
    found = inspect(prefix, tokenizer.vocab_size)
    assert (found.documents, found.sequences, found.pack_length) == (len(rows), len(pieces), 63)
    assert "packed: its documents are rows, its sequences texts, for samples of 63 tokens" in describe(found, None, 3)
    assert sorted(os.listdir(tmp_path)) == [
        "a.jsonl", "p_text_document.bin", "p_text_document.idx", "p_text_document.pack.json",
    ]  # fmt: skip


def test_the_seed_decides_the_order_and_without_one_it_is_0(tmp_path: Path, model: str, source: str) -> None:
    made = {}
    for name, seed in (("none", None), ("zero", 0), ("one", 1)):
        run(source, tmp_path / name, model, shuffle_seed=seed)
        made[name] = rows_of(str(tmp_path / f"{name}_text_document"))
    assert made["none"] == made["zero"] != made["one"]
    assert sorted(made["one"]) == sorted(made["zero"])


@pytest.mark.parametrize("seed", [None, 4])
def test_held_out_text_is_as_without_packing(tmp_path: Path, model: str, source: str, seed: int | None) -> None:
    run(source, tmp_path / "p", model, valid_fraction=0.3, shuffle_seed=seed)
    run(source, tmp_path / "q", model, valid_fraction=0.3, shuffle_seed=seed, pack_length=None)
    for kind in ("bin", "idx"):
        ours, theirs = ((tmp_path / f"{name}_valid_text_document.{kind}").read_bytes() for name in "pq")
        assert ours == theirs
    assert not (tmp_path / "p_valid_text_document.pack.json").exists()
    assert (tmp_path / "p_text_document.pack.json").exists()


def test_every_output_is_packed_by_itself(tmp_path: Path, model: str, source: str) -> None:
    pairs = [Template.parse("a={text}"), Template.parse("b={text} {text}")]
    made = run(source, tmp_path / "p", model, templates=pairs)
    for name in "ab":
        prefix = str(tmp_path / f"p_{name}_document")
        rows = rows_of(prefix)
        assert len(rows) == made[prefix].rows and max(sum(map(len, row)) for row in rows) <= 64
        assert read_note(prefix) == PackNote(63, len(rows), IndexedDataset(prefix).num_tokens)
    assert made[str(tmp_path / "p_b_document")].tokens > made[str(tmp_path / "p_a_document")].tokens


def test_a_set_that_is_written_again_without_packing_loses_its_note(tmp_path: Path, model: str, source: str) -> None:
    run(source, tmp_path / "p", model)
    run(source, tmp_path / "p", model, pack_length=None)
    assert read_note(str(tmp_path / "p_text_document")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"append_eod": False}, r"pack_length \(63\) needs append_eod: nothing else tells .* --append-eod"),
        ({"pack_length": 0}, r"pack_length \(0\) must lie between 1 and 16777216"),
        ({"pack_length": 1 << 30}, r"pack_length \(1073741824\) must lie between"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_written(
    tmp_path: Path, model: str, source: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "p", model, **changes)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_the_command_reports_rows_fullness_and_cut_documents(tmp_path: Path, model: str, source: str) -> None:
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", source, "--output-prefix"]
    command += [str(tmp_path / "p"), "--tokenizer-type", TYPE, "--tokenizer-model", model, "--pack-length", "63"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--append-eod" in refused.stderr
    done = subprocess.run([*command, "--append-eod"], capture_output=True, text=True, check=True)
    made = run(source, tmp_path / "q", model)[str(tmp_path / "q_text_document")]
    said = (
        f"150 documents in {made.rows} rows for samples of 63 tokens, {made.fullness:.2%} full; {made.cut} longer than"
    )
    assert f"{tmp_path / 'p_text_document'}: {said} a row and cut" in done.stdout


# ------------------------------------------------------------------------------------------------------- reading


def packed_pair(folder: Path, lengths: list[int], length: int, name: str = "p") -> tuple[str, list[list[list[int]]]]:
    """A packed set as preprocessing leaves it, and its rows."""
    folder.mkdir(exist_ok=True)
    stem, _ = write(folder, lengths)
    found = pack_documents(stem, U16, length, 0)
    prefix = str(folder / name)
    for kind in ("bin", "idx"):
        os.replace(f"{stem}.packed.{kind}", f"{prefix}.{kind}")
    (folder / f"{name}.pack.json").write_text(
        json.dumps({"format": 1, "pack_length": length, "rows": found.rows, "tokens": found.tokens})
    )
    return prefix, rows_of(prefix)


@given(lengths_of_documents, st.sampled_from([4, 12, 20]), st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_a_row_is_read_as_a_slice_and_by_parts(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, parts: int
) -> None:
    folder = tmp_path_factory.mktemp("x")
    pairs = [packed_pair(folder / name, sizes, length) for name, sizes in (("a", lengths), ("b", lengths[::-1]))]
    rows = [list(itertools.chain(*row)) for _, of_pair in pairs for row in of_pair]
    stream = PackedStream([prefix for prefix, _ in pairs], length, 1000)
    assert (stream.num_rows, stream.num_tokens) == (len(rows), 2 * sum(lengths))
    stream.check_vocab(1000)
    size = length // parts
    for k, row in enumerate(rows):
        assert stream.read(k * length, (k + 1) * length + 1).tolist() == row
        for i in range(parts):
            begin = k * length + i * size
            assert stream.read(begin, begin + size + 1).tolist() == row[i * size : (i + 1) * size + 1]
    for begin, end in ((-1, 1), (0, length + 2), (1, length + 2), (len(rows) * length, len(rows) * length + 1)):
        with pytest.raises(IndexError):
            stream.read(begin, end)


def test_reading_a_row_costs_a_few_reads_however_large_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, rows = packed_pair(tmp_path / "a", [3] * 20_000, 11)
    reads: list[int] = []
    pread = os.pread

    def counted(file: int, size: int, position: int) -> bytes:
        reads.append(size)
        return pread(file, size, position)

    monkeypatch.setattr(os, "pread", counted)
    stream = PackedStream([prefix], 11)
    assert len(reads) <= 8 and sum(reads) < 200
    reads.clear()
    assert stream.read(11 * 4000, 11 * 4001 + 1).tolist() == list(itertools.chain(*rows[4000]))
    assert len(reads) <= 4 and sum(reads) <= 16 + 8 + 8 + 24  # with the extension the tokens are read by it


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "no note",
            r"p\.pack\.json: no such file, so the pair is not packed; .* --pack-length, or remove `packed: true`",
        ),
        ("half a note", r"p\.pack\.json: is damaged"),
        ("no number", r"p\.pack\.json: is damaged"),
        ("a list", r"p\.pack\.json: is damaged"),
        ("true for a number", r"p\.pack\.json: is damaged"),
        ("beyond numbers", r"p\.pack\.json: is damaged"),
        ("deep", r"p\.pack\.json: is damaged"),
        ("no text", r"p\.pack\.json: is damaged"),
        ("a folder", r"p\.pack\.json: is no regular file"),
        ("a pipe", r"p\.pack\.json: is no regular file"),
        ("huge length", r"p: is packed for samples of 1000000000000000000 tokens, not of 11"),
        ("huge pair", r"p\.pack\.json: belongs to a pair of 1000000000000000000 rows and 1000000000000000000 tokens"),
        ("newer", r"p\.pack\.json: has format 2; only format 1 is known"),
        ("other length", r"p: is packed for samples of 12 tokens, not of 11 \(block_length\); .* --block-length 12"),
        ("other pair", r"p\.pack\.json: belongs to a pair of 9 rows and 5 tokens, and this one has"),
        ("short index", r"p\.idx: is .* bytes long, but"),
        ("short tokens", r"p\.bin: is .* bytes long, but"),
    ],
)
def test_what_is_no_packed_set_is_refused_at_opening(tmp_path: Path, damage: str, message: str) -> None:
    prefix, _ = packed_pair(tmp_path / "a", list(range(1, 30)), 11)
    note = Path(f"{prefix}.pack.json")
    said = json.loads(note.read_text())
    if damage == "no note":
        note.unlink()
    elif damage in ("a folder", "a pipe"):
        note.unlink()
        os.mkdir(note) if damage == "a folder" else os.mkfifo(note)
    elif damage == "no text":
        note.write_bytes(b"\xff\xfe{}")
    elif damage.startswith("short"):
        path = Path(f"{prefix}.{'idx' if damage == 'short index' else 'bin'}")
        path.write_bytes(path.read_bytes()[:-2])
    else:
        note.write_text(
            {
                "half a note": note.read_text()[:20],
                "no number": json.dumps(said | {"rows": "9"}),
                "a list": "[1]",
                "true for a number": json.dumps(said | {"rows": True}),
                "beyond numbers": note.read_text().replace('"rows": ', '"rows": 1' + "0" * 5000),
                "deep": "[" * 4000,
                "huge length": json.dumps(said | {"pack_length": 10**18}),
                "huge pair": json.dumps(said | {"rows": 10**18, "tokens": 10**18}),
                "newer": json.dumps(said | {"format": 2}),
                "other length": json.dumps(said | {"pack_length": 12}),
                "other pair": json.dumps(said | {"rows": 9, "tokens": 5}),
            }[damage]
        )
    with pytest.raises(DataError, match=message) as caught:
        PackedStream([prefix], 11)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("documents", 10**6, r"gives row 4500 the sequences \d+ to 1000000, of 20000"),
        ("documents", 0, r"gives row 4500 the sequences \d+ to 0"),
        ("offsets", 10**12, r"puts row \d+ at bytes"),
        ("offsets", 3, r"puts row \d+ at bytes"),
        ("long", 0, r"has row 4500 of 13 tokens, more than 11 \+ 1"),
    ],
)
def test_a_damaged_row_of_a_large_index_is_one_line(tmp_path: Path, place: str, value: int, message: str) -> None:
    prefix, rows = packed_pair(tmp_path / "a", [3] * 20_000, 11)
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    sequences = sum(map(len, rows))
    documents_at, offsets_at = 34 + 12 * sequences, 34 + 4 * sequences
    where = offsets_at + 8 * 4 * 4501 if place == "offsets" else documents_at + 8 * 4501
    if place == "long":  # one token of the next row too
        where = offsets_at + 8 * int(np.frombuffer(index, "<i8", 1, documents_at + 8 * 4501)[0])
        value = int(np.frombuffer(index, "<i8", 1, where)[0]) + 2
    index[where : where + 8] = value.to_bytes(8, "little")
    Path(f"{prefix}.idx").write_bytes(index)
    stream = PackedStream([prefix], 11)
    with pytest.raises(DataError, match=message) as caught:
        stream.read(11 * 4500, 11 * 4501 + 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("doctored", "message"),
    [
        (
            {"rows": 1},
            r"p\.pack\.json: belongs to a pair of 1 rows and \d+ tokens, and this one has \d+ and \d+; write",
        ),
        ({"tokens": 10**18}, r"belongs to a pair of \d+ rows and 1000000000000000000 tokens"),
        ({"pack_length": 5}, r"p\.pack\.json: says that rows are for samples of 5 tokens, and one has 12, more than"),
    ],
)
def test_a_note_of_another_pair_is_neither_inspected_nor_merged(
    tmp_path: Path, doctored: dict[str, int], message: str
) -> None:
    prefix, _ = packed_pair(tmp_path / "a", list(range(1, 30)), 11)
    note = Path(f"{prefix}.pack.json")
    assert inspect(prefix).pack_length == 11
    note.write_text(json.dumps(json.loads(note.read_text()) | doctored))
    with pytest.raises(DataError, match=message):
        inspect(prefix)
    if "pack_length" not in doctored:
        with pytest.raises(DataError, match=message):
            merge([prefix], str(tmp_path / "m"))
    assert repair(prefix).cut_bytes == 0 and inspect(prefix).documents > 0, "mending makes the note anew"


# ------------------------------------------------------------------------------------------------ merged and mended


def test_packed_sets_of_one_length_are_merged_to_one(tmp_path: Path) -> None:
    (a, rows), (b, others) = (packed_pair(tmp_path / x, list(range(1, n)), 11) for x, n in (("a", 30), ("b", 12)))
    merge([a, b], str(tmp_path / "m"))
    stream = PackedStream([str(tmp_path / "m")], 11)
    read = [stream.read(11 * k, 11 * k + 12).tolist() for k in range(stream.num_rows)]
    assert read == [list(itertools.chain(*row)) for row in [*rows, *others]]
    longer, _ = packed_pair(tmp_path / "c", [5, 9], 12)
    with pytest.raises(DataError, match=r"c/p: is packed for 12 tokens, but .*a/p is packed for 11 tokens; merge"):
        merge([a, longer], str(tmp_path / "m"))
    Path(f"{longer}.pack.json").unlink()
    with pytest.raises(DataError, match=r"c/p: is not packed, but .*a/p is packed for 11 tokens; merge"):
        merge([a, longer], str(tmp_path / "m"))
    merge([longer], str(tmp_path / "m"))
    assert read_note(str(tmp_path / "m")) is None and not list(tmp_path.glob("*tmp*"))


def test_a_packed_set_opens_at_no_moment_without_its_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (packed_pair(tmp_path / name, lengths, 11)[0] for name, lengths in (("a", [30, 3]), ("b", [7, 5])))
    rename, seen = os.replace, list[list[bool]]()

    def watched(old: str, new: str) -> None:  # where a kill may come
        rename(old, new)
        seen.append([Path(f"{tmp_path}/m{kind}").exists() for kind in (".idx", ".pack.json")])

    monkeypatch.setattr(os, "replace", watched)
    merge([a, b], str(tmp_path / "m"))
    assert seen[-1] == [True, True] and [True, False] not in seen


def test_what_is_left_of_a_packed_set_is_one(tmp_path: Path) -> None:
    prefix, rows = packed_pair(tmp_path / "a", [3, 7, 8, 12, 5, 2, 9, 30], 11)
    tokens = Path(f"{prefix}.bin")
    tokens.write_bytes(tokens.read_bytes()[:-3])
    assert repair(prefix).documents == len(rows) - 1
    stream = PackedStream([prefix], 11)
    read = [stream.read(11 * k, 11 * k + 12).tolist() for k in range(stream.num_rows)]
    assert read == [list(itertools.chain(*row)) for row in rows[:-1]]
    Path(f"{prefix}.idx").unlink()  # documents are told by their ends then: one of 30 tokens is longer than a row
    repair(prefix, U16, 0)
    assert read_note(prefix) is None and IndexedDataset(prefix).num_tokens == stream.num_tokens
