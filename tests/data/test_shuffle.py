"""The shuffle on disk: one order for a seed, however little memory it has, and every document exactly once."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import shuffle
from megapoly.data.shuffle import document_keys, shuffle_documents


def write(folder: Path, documents: list[bytes], itemsize: int = 2) -> str:
    (folder / "x.bin").write_bytes(b"".join(documents))
    np.array([len(d) // itemsize for d in documents], "<i4").tofile(folder / "x.lengths")
    return str(folder / "x")


def read(stem: str, itemsize: int = 2) -> list[bytes]:
    content, ends = Path(f"{stem}.bin").read_bytes(), np.cumsum(np.fromfile(f"{stem}.lengths", "<i4")) * itemsize
    return [content[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def documents(lengths: list[int]) -> list[bytes]:
    return [i.to_bytes(2, "little") * length for i, length in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=300),
    st.integers(0, 2**64 - 1),
    st.sampled_from([64, 300, 3000, 1 << 20]),
    st.sampled_from([2, 5, 128]),
)
def test_the_order_is_that_of_the_keys_whatever_the_memory(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int, leaf: int, files: int
) -> None:
    folder = tmp_path_factory.mktemp("x")
    found = documents(lengths)
    keys = document_keys(seed, np.arange(len(found), dtype=np.uint64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "FEW_DOCUMENTS", 3)
        patch.setattr(shuffle, "DOCUMENT_BYTES", 8)
        patch.setattr(shuffle, "MOST_FILES", files)
        patch.setattr(shuffle, "READ_BYTES", leaf)
        patch.setattr(shuffle, "READ_DOCUMENTS", 17)
        out = shuffle_documents(write(folder, found), 2, seed, leaf)
    assert read(out) == [found[i] for i in np.argsort(keys, kind="stable")]
    assert sorted(os.listdir(folder)) == ["x.bin", "x.lengths", "x.shuffled.bin", "x.shuffled.lengths"]


def test_what_an_attempt_left_is_begun_anew(tmp_path: Path) -> None:
    stem = write(tmp_path, documents([3] * 50))
    (tmp_path / "x.shuffled.buckets").mkdir()
    (tmp_path / "x.shuffled.buckets" / "x-000.bin").write_bytes(b"junk")
    (tmp_path / "x.shuffled.bin").write_bytes(b"junk" * 1000)
    assert sorted(read(shuffle_documents(stem, 2, 1))) == sorted(documents([3] * 50))


def test_keys_are_spread_and_stay_what_they_are() -> None:
    n = 100_000
    keys = document_keys(7, np.arange(n, dtype=np.uint64))
    assert len(set(keys.tolist())) == n
    counts = np.histogram((keys >> np.uint64(56)).astype(int), bins=256, range=(0, 256))[0]
    assert float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 350  # chi-square, 255 degrees of freedom
    ranks = np.argsort(np.argsort(keys))
    assert abs(np.corrcoef(ranks, np.arange(n))[0, 1]) < 0.01
    assert abs(np.corrcoef(ranks[1:], ranks[:-1])[0, 1]) < 0.01
    others = document_keys(8, np.arange(n, dtype=np.uint64))
    assert abs(np.corrcoef(ranks, np.argsort(np.argsort(others)))[0, 1]) < 0.01
    # The order of a seed must stay what it is: data sets are named by it.
    assert np.argsort(document_keys(42, np.arange(10, dtype=np.uint64))).tolist() == ORDER


ORDER = [3, 7, 1, 2, 5, 9, 6, 0, 8, 4]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    peaks = []
    for count in (10_000, 40_000):
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 120, count)
        folder = tmp_path / str(count)
        folder.mkdir()
        rng.integers(0, 60_000, int(lengths.sum())).astype("<u2").tofile(folder / "x.bin")
        lengths.astype("<i4").tofile(folder / "x.lengths")
        monkeypatch.setattr(shuffle, "READ_BYTES", 1 << 18)
        tracemalloc.start()
        shuffle_documents(str(folder / "x"), 2, 3, leaf_bytes=1 << 18)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks
