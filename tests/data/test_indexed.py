"""The .bin/.idx format: bytes as Megatron-LM lays them out, nothing trusted unchecked, nothing half-written visible."""

import copy
import errno
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapoly.data import indexed, reader
from megapoly.data.indexed import IndexedDataset, IndexedDatasetWriter, TokenStream
from megapoly.data.native import NATIVE, Native
from megapoly.errors import DataError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [[1, 2, 3], [40000], [7, 8]]


def write(prefix: Path | str, documents: list[list[int]], vocab_size: int = 50000) -> str:
    with IndexedDatasetWriter(str(prefix), vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finalize()
    return str(prefix)


def expected_index(lengths: list[int], code: int, item: int) -> bytes:
    """The layout of megatron/core/datasets/indexed_dataset.py, field by field."""
    ends = np.cumsum([0, *lengths]) * item
    n = len(lengths)
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", n)
        + struct.pack("<Q", n + 1)
        + struct.pack(f"<{n}i", *lengths)
        + struct.pack(f"<{n}q", *ends[:-1])
        + struct.pack(f"<{n + 1}q", *range(n + 1))
    )


@pytest.mark.parametrize(
    ("vocab_size", "code", "letter"), [(300, 8, "H"), (65499, 8, "H"), (65500, 4, "i"), (256000, 4, "i")]
)
def test_bytes_are_those_of_megatron(tmp_path: Path, vocab_size: int, code: int, letter: str) -> None:
    documents = [[5, 0, 299], [1], [2, 3]]
    prefix = write(tmp_path / "a", documents, vocab_size)
    flat = [token for document in documents for token in document]
    assert Path(prefix + ".bin").read_bytes() == struct.pack(f"<{len(flat)}{letter}", *flat)
    assert Path(prefix + ".idx").read_bytes() == expected_index([3, 1, 2], code, struct.calcsize(f"<{letter}"))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.lists(st.integers(0, 70000), max_size=5), max_size=8), chunk=st.integers(1, 3))
def test_what_is_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[list[int]], chunk: int
) -> None:
    monkeypatch.setattr(indexed, "WRITE_CHUNK", chunk)
    monkeypatch.setattr(reader, "INDEX_CHUNK", chunk)
    dataset = IndexedDataset(write(tmp_path / "a", documents, 70001))
    filled = [document for document in documents if document]
    assert [dataset[i].tolist() for i in range(len(dataset))] == filled
    assert dataset.num_documents == dataset.num_sequences == len(filled)
    assert dataset.tokens(0, dataset.num_tokens).tolist() == [token for document in filled for token in document]


def test_a_file_of_several_sequences_a_document_is_read(tmp_path: Path) -> None:
    index = bytearray(expected_index([2, 2, 0], 4, 4))
    index[-32:] = struct.pack("<4q", 0, 2, 2, 3)
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(np.arange(4, dtype="<i4").tobytes())
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert (dataset.num_sequences, dataset.num_documents, dataset.num_tokens) == (3, 3, 4)
    assert dataset[1].tolist() == [2, 3] and dataset[2].tolist() == []


def patch(offset: int, layout: str, value: object) -> Callable[[bytearray], None]:
    def damage(index: bytearray) -> None:
        struct.pack_into(layout, index, offset, value)

    return damage


DAMAGES: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "magic": (patch(0, "9s", b"NOTANIDX!"), "starts with"),
    "version": (patch(9, "<Q", 2), "version 2"),
    "unknown type": (patch(17, "<B", 77), "dtype code 77"),
    "float type": (patch(17, "<B", 7), "floating"),
    "absurd count": (patch(18, "<Q", 2**63), str(2**63)),
    "absurd document count": (patch(26, "<Q", 2**40), str(2**40)),
    "negative length": (patch(34, "<i", -3), "-3"),
    "length that overlaps": (patch(34, "<i", 2), "sequence 1 at byte 6, not at 4"),
    "offset backwards": (patch(34 + 12 + 8, "<q", 0), "sequence 1 at byte 0, not at 6"),
    "last length too long": (patch(34 + 8, "<i", 2**31 - 1), "describes 4294967302"),
    "documents do not start at 0": (patch(34 + 36, "<q", 1), "from 1 to 3"),
    "documents end early": (patch(34 + 36 + 24, "<q", 2), "from 0 to 2"),
    "documents fall": (patch(34 + 36 + 8, "<q", 3), "falls from 3 to 2"),
    "trailing bytes": (lambda index: index.extend(b"123"), "need 102"),
}


USES: dict[str, Callable[[IndexedDataset], object]] = {
    "check": lambda dataset: dataset.check(),
    "lengths": lambda dataset: dataset.lengths,
    "offsets": lambda dataset: dataset.offsets,
    "documents": lambda dataset: dataset.document_index,
    "sequence": lambda dataset: dataset[2],
}
# What the ends of an index cannot tell is found at opening where it is small, else before the first use of an entry.
INSIDE = {"negative length", "length that overlaps", "offset backwards", "documents fall"}


@pytest.mark.parametrize("use", [None, *USES])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, use: str | None
) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    damage, words = DAMAGES[name]
    index = bytearray(Path(prefix + ".idx").read_bytes())
    damage(index)
    Path(prefix + ".idx").write_bytes(index)
    if use is not None:
        monkeypatch.setattr(reader, "CHECKED_AT_OPENING", 0)
        if name in INSIDE:
            dataset = IndexedDataset(prefix)
            assert TokenStream([prefix]).read(0, 6).tolist() == [1, 2, 3, 40000, 7, 8]  # of the .bin alone
            for _ in range(2):  # a refusal is not forgotten
                with pytest.raises(DataError, match=words):
                    USES[use](dataset)
            return
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    assert words in str(caught.value) and prefix in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("at_opening", [0, 4096])
def test_every_truncation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_opening: int) -> None:
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", at_opening)
    prefix = write(tmp_path / "a", DOCUMENTS)
    for kind in ("idx", "bin"):
        whole = Path(f"{prefix}.{kind}").read_bytes()
        for size in range(len(whole)):
            Path(f"{prefix}.{kind}").write_bytes(whole[:size])
            with pytest.raises(DataError, match=str(size)):
                IndexedDataset(prefix)
        Path(f"{prefix}.{kind}").write_bytes(whole)
    IndexedDataset(prefix)
    os.remove(prefix + ".bin")
    with pytest.raises(DataError, match="no such file"):
        IndexedDataset(prefix)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 101), value=st.integers(0, 255), at_opening=st.sampled_from([0, 4096]))
def test_no_byte_of_the_index_can_cause_anything_but_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int, value: int, at_opening: int
) -> None:
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", at_opening)
    prefix = write(tmp_path / "a", DOCUMENTS)
    index = bytearray(Path(prefix + ".idx").read_bytes())
    index[position] = value
    Path(prefix + ".idx").write_bytes(index)
    try:
        dataset = IndexedDataset(prefix)
        assert len(dataset.tokens(0, dataset.num_tokens)) == dataset.num_tokens
        dataset.check()
    except DataError:
        return
    assert sum(len(dataset[i]) for i in range(len(dataset))) == dataset.num_tokens


def test_opening_costs_nothing_for_a_large_index(tmp_path: Path) -> None:
    # The header and the ends of an index of 10^9 documents (20 GB), with nothing between; 2 TB of tokens.
    n, length = 10**9, 1000
    with open(tmp_path / "a.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, n, n + 1))
        for position, layout, value in (
            (34 + 4 * (n - 1), "<i", length),
            (34 + 4 * n + 8 * (n - 1), "<q", 2 * length * (n - 1)),
            (34 + 12 * n + 8 * n, "<q", n),
        ):
            file.seek(position)
            file.write(struct.pack(layout, value))
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(2 * length * n)
    start = time.process_time()
    stream = TokenStream([str(tmp_path / "a")], 50000)
    stream.check_vocab(50000)
    assert time.process_time() - start < 0.1
    assert stream.num_tokens == n * length
    assert stream.read(n * length - 3, n * length).tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="sequence 1 at byte 0"):
        write_lengths(tmp_path / "a.idx", [length, length])
        stream.datasets[0][0]


def write_lengths(path: Path, lengths: list[int]) -> None:
    with open(path, "r+b") as file:
        file.seek(34)
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))


@pytest.mark.parametrize("at_opening", [0, 4096])
def test_files_that_change_after_opening_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_opening: int
) -> None:
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", at_opening)
    prefix = write(tmp_path / "a", [[1, 2, 3], [4, 5, 6]])
    dataset, stream = IndexedDataset(prefix), TokenStream([prefix])
    with open(prefix + ".bin", "r+b") as file:
        file.truncate(7)
    assert dataset.tokens(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"a\.bin: ends at byte 7, before its 6 tokens"):
        stream.read(1, 6)
    with pytest.raises(DataError, match="is 7 bytes long"):
        IndexedDataset(prefix)


def test_an_index_that_was_replaced_after_opening_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", 0)
    prefix = write(tmp_path / "a", [[1, 2, 3], [4, 5, 6]])
    for others in ([[1, 2, 3, 4, 5, 6]], [[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5, 6, 7]]):
        dataset = IndexedDataset(prefix)
        changed = Path(write(tmp_path / "b", others) + ".idx").read_bytes()
        original = Path(prefix + ".idx").read_bytes()
        Path(prefix + ".idx").write_bytes(changed)
        with pytest.raises(DataError, match="opened"):
            dataset.check()
        assert dataset.tokens(0, 6).tolist() == [1, 2, 3, 4, 5, 6]
        Path(prefix + ".idx").write_bytes(original)
    dataset = IndexedDataset(prefix)
    Path(prefix + ".idx").write_bytes(b"")
    with pytest.raises(DataError, match="became empty"):
        dataset.check()
    os.remove(prefix + ".idx")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        dataset.check()


def test_more_files_than_the_soft_limit_can_be_open_and_close_with_their_dataset(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 3]])
    code = f"""
import os, resource
from megapoly.data.indexed import TokenStream
from megapoly.errors import DataError
before = len(os.listdir("/proc/self/fd"))
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 200))
stream = TokenStream([{prefix!r}] * 150)
assert stream.read(440, 450).tolist() == [3, 1, 2, 3, 1, 2, 3, 1, 2, 3]
assert len(os.listdir("/proc/self/fd")) == before + 150
try:
    TokenStream([{prefix!r}] * 250)
except DataError as error:
    assert "Too many open files" in str(error) and "ulimit -n" in str(error), error
else:
    raise AssertionError
del stream
assert len(os.listdir("/proc/self/fd")) == before
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stderr


def test_a_dataset_can_be_copied_to_another_process(tmp_path: Path) -> None:
    dataset = copy.deepcopy(IndexedDataset(write(tmp_path / "a", DOCUMENTS)))
    assert dataset[1].tolist() == [40000]


def test_reads_of_more_than_the_kernel_gives_at_once_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = TokenStream([write(tmp_path / "a", [list(range(100))])])
    read = os.pread
    monkeypatch.setattr(reader, "NATIVE", Native(None))
    monkeypatch.setattr(os, "pread", lambda handle, size, position: read(handle, min(size, 7), position))
    assert stream.read(3, 90).tolist() == list(range(3, 90))

    def fail(handle: int, size: int, position: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"a\.bin: cannot be read: Input/output error"):
        stream.read(3, 90)


def test_nothing_has_its_name_before_the_end(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"), IndexedDatasetWriter(str(tmp_path / "a"), 100) as writer:
        writer.add_document([1, 2])
        assert not {"a.bin", "a.idx"} & set(os.listdir(tmp_path))
        raise RuntimeError("interrupted")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_rewrite_leaves_the_old_dataset(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(DataError, match="id 50000"), IndexedDatasetWriter(prefix, 50000) as writer:
        writer.add_document([1, 50000])
    assert IndexedDataset(prefix).num_tokens == 6
    write(prefix, [[9]])
    assert IndexedDataset(prefix).tokens(0, 1).tolist() == [9]
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


def test_a_stream_reads_across_borders_and_empty_files(tmp_path: Path) -> None:
    parts = [[[1, 2, 3]], [], [[4]], [[5, 6], [70000]]]
    prefixes = [write(tmp_path / str(i), part, 70001) for i, part in enumerate(parts)]
    stream = TokenStream(prefixes)
    whole = [1, 2, 3, 4, 5, 6, 70000]
    assert stream.num_tokens == len(whole)
    for begin in range(len(whole) + 1):
        for end in range(begin, len(whole) + 1):
            part = stream.read(begin, end)
            assert part.tolist() == whole[begin:end] and part.dtype == np.int64
    with pytest.raises(IndexError):
        stream.read(5, 8)


def test_ids_outside_the_vocabulary_are_found_with_file_and_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = [write(tmp_path / "a", [[1] * 1000]), write(tmp_path / "b", [[2] * 3000 + [777] + [2] * 3000])]
    monkeypatch.setattr(indexed, "EDGE_SCAN_BYTES", 512)
    stream = TokenStream(prefixes)
    stream.check_vocab(778)
    with pytest.raises(DataError, match=r"b\.bin: token 3000 has id 777, but the vocabulary ends at 776"):
        stream.check_vocab(777)
    monkeypatch.setattr(indexed, "FULL_SCAN_BYTES", 10000)
    stream.check_vocab(777)  # large files: the ends alone
    for position in (0, 9999):
        ids = [3] * 10000
        ids[position] = 50
        with pytest.raises(DataError, match=f"token {position} has id 50"):
            TokenStream([write(tmp_path / "c", [ids])]).check_vocab(50)
    guarded = TokenStream(prefixes, vocab_size=777)
    assert guarded.read(999, 1001).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"b\.bin: token 3000 has id 777"):
        guarded.read(990, 5000)


@pytest.mark.parametrize("found", [NATIVE, Native(None)], ids=["native", "numpy"])
@pytest.mark.parametrize(("code", "layout"), [(1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_ids_of_every_type_are_checked_at_their_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, layout: str, found: Native
) -> None:
    monkeypatch.setattr(reader, "NATIVE", found)
    info = np.iinfo(layout)
    for value in {0, 99, 100, 101, info.max - 1, info.max, info.min, max(-1, info.min), max(-100, info.min)}:
        ids = np.array([1, value, 2], layout)
        index = struct.pack("<9sQBQQiqqq", b"MMIDIDX\x00\x00", 1, code, 1, 2, 3, 0, 0, 1)
        (tmp_path / "a.idx").write_bytes(index)
        (tmp_path / "a.bin").write_bytes(ids.tobytes())
        plain = TokenStream([str(tmp_path / "a")]).read(0, 3)
        assert plain.tolist() == ids.tolist() and plain.dtype == np.int64
        for vocab_size in (100, 101, 200, 2**31):
            stream = TokenStream([str(tmp_path / "a")], vocab_size)
            if 0 <= value < vocab_size:
                assert stream.read(0, 3).tolist() == ids.tolist()
            else:
                with pytest.raises(DataError, match=f"token 1 has id {value},"):
                    stream.read(0, 3)


@pytest.mark.skipif(NATIVE.module is None, reason=NATIVE.reason)
def test_the_extension_reads_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    read = NATIVE.module.read_tokens  # type: ignore[union-attr]
    prefix = write(tmp_path / "a", [[1, 2, 3, 49999]])
    with open(prefix + ".bin", "rb") as file:
        handle = file.fileno()
        for first in range(5):
            for count in range(5 - first):
                assert read(handle, first, count, "u2", 50000).tolist() == [1, 2, 3, 49999][first : first + count]
        assert read(handle, 0, 4, "u2", 49999) is None  # an id at the limit
        assert read(handle, 0, 4, "i2", 50000) is None  # 49999 is negative there
        assert read(handle, 3, 2, "u2", 50000) is None  # beyond the end
        assert read(handle, 2**60, 1, "i8", 50000) is None
        for wrong in (
            (-1, 1, "u2"),
            (0, -1, "u2"),
            (0, 2**63 - 1, "u2"),
            (2**60 + 1, 1, "u2"),
            (0, 1, "f4"),
            (0, 1, ""),
        ):
            with pytest.raises(ValueError, match="range|unknown"):
                read(handle, *wrong, 50000)
        with pytest.raises(MemoryError):
            read(handle, 0, 2**58, "u1", 50000)
    assert read(handle, 0, 1, "u2", 50000) is None  # closed by now


def test_a_negative_id_is_out_of_range(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2]], 100000)
    (tmp_path / "a.bin").write_bytes(struct.pack("<2i", 1, -5))
    with pytest.raises(DataError, match="id -5"):
        TokenStream([prefix]).check_vocab(100000)
