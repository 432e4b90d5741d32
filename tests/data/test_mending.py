"""Merged datasets are their parts one after the other; of a damaged one a whole beginning is kept, never a wrong token."""

import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data.corpus import LanguageIdentifier
from megapoly.data.indexed import IndexedDatasetWriter, TokenStream
from megapoly.data.inspection import document_lengths, identified_shares, inspect, pairs_of, samples
from megapoly.data.mending import merge, repair, write_index
from megapoly.data.reader import HEADER, IndexedDataset
from megapoly.errors import DataError
from megapoly.tokenizer.load import load_tokenizer
from megapoly.tokenizer.train import train_byte_level_bpe

ROOT = Path(__file__).parents[2]
EOD = 7
U16 = np.dtype("<u2")
texts = st.lists(st.lists(st.sampled_from([1, 2, 3, 900]), max_size=6), max_size=8)


def write(prefix: Path, documents: list[list[int]], vocab: int = 1000) -> list[list[int]]:
    """Write documents, each ended by EOD; returns them so."""
    ended = [[*document, EOD] for document in documents]
    with IndexedDatasetWriter(str(prefix), vocab) as writer:
        for document in ended:
            writer.add_document(document)
        writer.finalize()
    return ended


def read(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    dataset.check()
    borders = np.append(0, np.cumsum(document_lengths(dataset)))
    return [dataset.tokens(int(a), int(b)).tolist() for a, b in itertools.pairwise(borders)]


def fresh(folder: Path, name: str) -> Path:
    for path in folder.glob(f"{name}.*"):
        path.unlink()
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@given(st.lists(texts, min_size=1, max_size=4), st.sampled_from([1000, 100_000]))
@settings(max_examples=50, deadline=None)
def test_a_merged_dataset_is_its_parts(folder: Path, parts: list[list[list[int]]], vocab: int) -> None:
    written = [write(fresh(folder, f"part{i}"), documents, vocab) for i, documents in enumerate(parts)]
    whole = [document for part in written for document in part]
    told = merge([str(folder / f"part{i}") for i in range(len(parts))], str(folder / "whole"))
    assert told == (len(whole), sum(map(len, whole)))
    assert read(folder / "whole") == whole
    write(fresh(folder, "at once"), [document[:-1] for document in whole], vocab)
    for kind in (".bin", ".idx"):
        assert Path(f"{folder}/whole{kind}").read_bytes() == Path(f"{folder}/at once{kind}").read_bytes()
    assert not list(folder.glob("*tmp*"))


def test_documents_of_several_sequences_stay_together(tmp_path: Path) -> None:
    prefix = tmp_path / "sentences"
    np.arange(10, dtype=U16).tofile(f"{prefix}.bin")
    write_index(f"{prefix}.idx", U16, [(np.array([2, 3, 1, 4]), np.array([0, 2, 2, 4]))])
    assert read(prefix) == [[0, 1, 2, 3, 4], [], [5, 6, 7, 8, 9]]
    for kind in ("bin", "idx"):
        shutil.copy(f"{prefix}.{kind}", tmp_path / f"copy.{kind}")
    merge([str(prefix), str(tmp_path / "copy")], str(tmp_path / "twice"))
    assert read(tmp_path / "twice") == read(prefix) * 2
    found = inspect(str(tmp_path / "twice"))
    assert (found.documents, found.sequences, found.tokens, found.empty_documents) == (6, 8, 20, 2)
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:8])  # in the second sequence of the first
    assert repair(str(prefix)).documents == 0
    assert read(prefix) == []


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2]])
    write(tmp_path / "wide", [[1, 2]], vocab=100_000)
    with pytest.raises(DataError, match="wide.bin: holds ids as int32, but .*a.bin as uint16"):
        merge([str(tmp_path / "a"), str(tmp_path / "wide")], str(tmp_path / "out"))
    with pytest.raises(DataError, match="is one of the datasets"):
        merge([str(tmp_path / "a")], f"{tmp_path}/../{tmp_path.name}/a")
    with pytest.raises(DataError, match="a: is given twice; give each dataset once"):
        merge([str(tmp_path / "a"), f"{tmp_path}/../{tmp_path.name}/a"], str(tmp_path / "out"))
    with pytest.raises(DataError, match="nothing to merge"):
        merge([], str(tmp_path / "out"))
    with pytest.raises(DataError, match="no such file"):
        merge([str(tmp_path / "b")], str(tmp_path / "out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        merge([str(tmp_path / "a")], str(tmp_path / "file/out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "file", "wide.bin", "wide.idx"]


@given(texts, st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_cut_off_leaves_a_whole_beginning(
    folder: Path, documents: list[list[int]], data: st.DataObject
) -> None:
    prefix = fresh(folder, "cut")
    whole = write(prefix, documents)
    contents = {kind: Path(f"{prefix}{kind}").read_bytes() for kind in (".bin", ".idx")}
    left = {kind: content[: data.draw(st.integers(0, len(content)))] for kind, content in contents.items()}
    damaged = data.draw(st.sampled_from([(".bin",), (".idx",), (".bin", ".idx")]))
    for kind in damaged:
        Path(f"{prefix}{kind}").write_bytes(left[kind])
    told = repair(str(prefix), U16, EOD)
    kept = read(prefix)
    assert kept == whole[: len(kept)] and told.documents == len(kept) and told.tokens == sum(map(len, kept))
    there = len(left[".bin"]) if ".bin" in damaged else len(contents[".bin"])
    assert told.cut_bytes == there - 2 * told.tokens
    # Nothing whole is lost: what the lengths that are left or, without any, the ends of documents can tell.
    by_bin = sum(2 * sum(map(len, whole[: i + 1])) <= there for i in range(len(whole)))
    lengths = len(whole)
    if ".idx" in damaged and len(left[".idx"]) >= HEADER.size:
        lengths = min(lengths, (len(left[".idx"]) - HEADER.size) // 4)
    assert len(kept) == min(by_bin, lengths)
    again = {kind: Path(f"{prefix}{kind}").read_bytes() for kind in contents}
    assert repair(str(prefix), U16, EOD).cut_bytes == 0
    assert again == {kind: Path(f"{prefix}{kind}").read_bytes() for kind in contents}


def test_a_whole_dataset_is_not_changed(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3], []])
    before = [Path(f"{tmp_path}/a{kind}").read_bytes() for kind in (".bin", ".idx")]
    assert repair(str(tmp_path / "a")).cut_bytes == 0
    assert before == [Path(f"{tmp_path}/a{kind}").read_bytes() for kind in (".bin", ".idx")]


def test_tokens_beyond_the_index_are_cut_off(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3], [4, 5, 6]])
    with open(tmp_path / "a.bin", "ab") as file:
        file.write(b"\x01\x00\x02")
    told = repair(str(tmp_path / "a"))
    assert (told.documents, told.cut_bytes) == (3, 3)


@given(texts, st.data())
@settings(max_examples=150, deadline=None)
def test_one_false_bit_in_the_index_costs_no_document_but_the_last(
    folder: Path, documents: list[list[int]], data: st.DataObject
) -> None:
    prefix = fresh(folder, "flipped")
    whole = write(prefix, documents)
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    bit = data.draw(st.integers(0, 8 * len(index) - 1))
    index[bit // 8] ^= 1 << bit % 8
    Path(f"{prefix}.idx").write_bytes(index)
    before = Path(f"{prefix}.bin").read_bytes()
    try:
        repair(str(prefix))
    except DataError:
        assert Path(f"{prefix}.bin").read_bytes() == before and Path(f"{prefix}.idx").read_bytes() == index
        return
    kept = [document for document in read(prefix) if document]  # a false number of sequences may add empty ones
    assert kept in (whole, whole[:-1])  # no offset tells where the last one ends


@pytest.mark.parametrize(
    ("at", "layout", "wrong"),
    [(HEADER.size + 3, "B", 0x40), (HEADER.size + 4 * 50, "<i", -2), (18, "<Q", 36)],
    ids=["too long", "negative", "too few"],
)
def test_an_index_that_is_false_in_its_midst_is_refused(tmp_path: Path, at: int, layout: str, wrong: int) -> None:
    whole = write(tmp_path / "a", [list(range(9, 18))] * 100)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into(layout, index, at, wrong)
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(
        DataError, match=r"a\.idx: contradicts itself and the 2000 bytes .* nothing was cut off; copy it"
    ):
        repair(str(tmp_path / "a"))
    (tmp_path / "a.idx").unlink()
    assert repair(str(tmp_path / "a"), U16, EOD).cut_bytes == 0
    assert read(tmp_path / "a") == whole


def test_offsets_that_are_false_are_made_again_from_lengths_that_the_tokens_confirm(tmp_path: Path) -> None:
    whole = write(tmp_path / "a", [[1, 2], [3], [4, 5, 6]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into("<q", index, HEADER.size + 4 * 3 + 8, 2)
    (tmp_path / "a.idx").write_bytes(index)
    assert repair(str(tmp_path / "a")).cut_bytes == 0
    assert read(tmp_path / "a") == whole


@pytest.mark.parametrize(("at", "wrong"), [(-8, 5), (-16, 9), (-32, 1)])
def test_a_document_index_that_contradicts_itself_is_made_again(tmp_path: Path, at: int, wrong: int) -> None:
    whole = write(tmp_path / "a", [[1, 2], [3], [4, 5, 6]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    place = len(index) + at
    index[place : place + 8] = wrong.to_bytes(8, "little")
    (tmp_path / "a.idx").write_bytes(index)
    assert repair(str(tmp_path / "a")).cut_bytes == 0
    assert read(tmp_path / "a") == whole


@pytest.mark.parametrize("at", [0, 9, 17])  # its mark, its version, the type of the ids
def test_an_index_of_another_kind_tells_nothing(tmp_path: Path, at: int) -> None:
    whole = write(tmp_path / "a", [[1, 2], [3]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[at] = 99
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DataError, match="tells nothing"):
        repair(str(tmp_path / "a"))
    repair(str(tmp_path / "a"), U16, EOD)
    assert read(tmp_path / "a") == whole


def test_a_dataset_that_is_being_written_is_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [[1, 2]])
    monkeypatch.setattr("megapoly.data.mending.shutil.copyfileobj", lambda file, whole, _: whole.write(file.read() * 2))
    with pytest.raises(DataError, match="12 bytes came together instead of 6; is a dataset being written"):
        merge([str(tmp_path / "a")], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_what_tells_no_documents_apart_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2]])
    (tmp_path / "a.idx").unlink()
    with pytest.raises(DataError, match="tells nothing of the documents .* give the tokenizer"):
        repair(str(tmp_path / "a"))
    with pytest.raises(DataError, match="cannot be mended: No such file"):
        repair(str(tmp_path / "b"), U16, EOD)


@given(texts, st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_an_inspection_counts_everything(folder: Path, documents: list[list[int]], most: int) -> None:
    whole = write(fresh(folder, "seen"), documents)
    found = inspect(str(folder / "seen"))
    counted = Counter(token for document in whole for token in document)
    assert dict(found.frequent(1000)) == counted
    assert [count for _, count in found.frequent(1000)] == sorted(counted.values(), reverse=True)
    lengths = sorted(map(len, whole))
    assert sum(count for *_, count in found.length_histogram) == len(whole)
    for low, high, count in found.length_histogram:
        assert count == sum(low <= length < high for length in lengths)
    if lengths:
        assert (found.length_percentiles[0], found.length_percentiles[100]) == (lengths[0], lengths[-1])
    part = inspect(str(folder / "seen"), max_tokens=most)
    assert part.read_tokens == part.counts.sum() == min(most, found.tokens)
    json.dumps(found.to_json(None, 3))


def test_stretches_lie_evenly_and_ids_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [[1] * 9, [2] * 9, [3] * 9])
    monkeypatch.setattr("megapoly.data.inspection.TOKENS_AT_ONCE", 4)
    found = inspect(str(tmp_path / "a"), max_tokens=12)
    assert {id: int(count) for id, count in enumerate(found.counts) if count} == {1: 4, 2: 4, 3: 3, EOD: 1}
    with pytest.raises(DataError, match="token 9 has id 7, but the vocabulary ends at 4"):
        inspect(str(tmp_path / "a"), vocab_size=5)


def test_an_id_beyond_any_vocabulary_takes_no_memory(tmp_path: Path) -> None:
    np.array([5, 2**31 - 1], "<i4").tofile(tmp_path / "a.bin")
    write_index(f"{tmp_path}/a.idx", np.dtype("<i4"), [(np.array([2]), np.array([0, 1]))])
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.bin: has the id 2147483647, beyond any vocabulary; give its tokenizer"):
        inspect(str(tmp_path / "a"))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in two languages, and their tokenizer."""
    folder = tmp_path_factory.mktemp("spoken")
    languages = {
        "en": "the river ran slowly through the old town and ",
        "ko": "강물이 오래된 마을을 천천히 지나 흐르고 있었다 ",
    }
    lines = [text * 8 for text in languages.values()]
    train_byte_level_bpe(lines, str(folder / "tokenizer"), 300)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer"))
    with IndexedDatasetWriter(str(folder / "both_text_document"), 300) as writer:
        for line in [*lines, lines[0]]:
            writer.add_document([*tokenizer.encode(line), tokenizer.eod])
        writer.finalize()
    return folder


def test_samples_are_text_and_languages_are_identified(spoken: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(spoken / "tokenizer"))
    prefix = str(spoken / "both_text_document")
    drawn = samples(prefix, tokenizer, 2, seed=3)
    assert len(drawn) == 2 and drawn == samples(prefix, tokenizer, 2, seed=3)
    for i, text in drawn:
        assert text.startswith("강물이" if i == 1 else "the river")
    shares = identified_shares(prefix, tokenizer, LanguageIdentifier(["en", "ko"]), 10, seed=3)
    lengths = document_lengths(IndexedDataset(prefix))
    assert shares == pytest.approx({"en": (lengths[0] + lengths[2]) / lengths.sum(), "ko": lengths[1] / lengths.sum()})


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"tools/{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_tools(spoken: Path, tmp_path: Path) -> None:
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(spoken / "tokenizer")]
    prefix = str(spoken / "both_text_document")
    done = tool("inspect_data", str(spoken), *tokenizer, "--languages", "en", "ko")
    assert done.returncode == 0 and f"{prefix}: whole" in done.stdout and re.search("languages  .*en .*%", done.stdout)
    assert "the river ran" in done.stdout and "강물이" in done.stdout
    whole = json.loads(tool("inspect_data", prefix, "--json").stdout)
    assert whole["documents"] == 3
    twice = tool("merge_datasets", "--input", f"{prefix}.idx", prefix, "--output-prefix", str(tmp_path / "m"))
    assert twice.returncode == 2 and "both_text_document: is given twice; give each dataset once" in twice.stderr
    for kind in ("bin", "idx"):
        shutil.copy(f"{prefix}.{kind}", tmp_path / f"copy.{kind}")
    both = [f"{prefix}.idx", str(tmp_path / "copy")]
    merged = tool("merge_datasets", "--input", *both, "--output-prefix", str(tmp_path / "m"))
    assert merged.stdout == f"{tmp_path}/m: 2 datasets, 6 documents, {2 * whole['tokens']:,} tokens\n"
    (tmp_path / "m.idx").write_bytes((tmp_path / "m.idx").read_bytes()[:-1])
    damaged = tool("inspect_data", str(tmp_path / "m"))
    assert damaged.returncode == 2 and damaged.stderr.count("\n") == 1 and f"{tmp_path}/m.idx: is " in damaged.stderr
    mended = tool("inspect_data", str(tmp_path), "--repair")
    assert mended.returncode == 0 and "mended: 6 documents" in mended.stdout
    (tmp_path / "m.idx").unlink()
    assert tool("inspect_data", str(tmp_path / "m"), "--repair").returncode == 2
    assert "mended: 6 documents" in tool("inspect_data", str(tmp_path / "m"), "--repair", *tokenizer).stdout
    for flag in ("--samples", "--frequent", "--identify", "--max-tokens"):
        assert f"error: {flag} (-1) must not be negative" in tool("inspect_data", prefix, flag, "-1").stderr
    for wrong in (["--samples"], [str(tmp_path / "none")], [prefix, "--languages", "en"], [prefix, *tokenizer[:2]]):
        refused = tool("inspect_data", *wrong)
        assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_folders_and_files_name_their_pairs(tmp_path: Path) -> None:
    write(tmp_path / "b.x", [[1]])
    write(tmp_path / "a", [[1]])
    assert pairs_of([str(tmp_path)]) == [f"{tmp_path}/a", f"{tmp_path}/b.x"]
    assert pairs_of(["p.idx", "q.bin", "r"]) == ["p", "q", "r"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no .idx files"):
        pairs_of([str(tmp_path / "empty")])
    assert TokenStream([f"{tmp_path}/a", f"{tmp_path}/b.x"]).num_tokens == 4
