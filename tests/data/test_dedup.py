"""Deduplication as a whole: what stays, that nothing but the documents decides it, and what bad files end in."""

import gzip
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.writers.jsonl import JsonlWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapoly.data.clean import dedup, dedup_files
from megapoly.data.clean.dedup import DedupSettings, DropDuplicates, Plan, dedup_stages, documents_reader
from megapoly.data.clean.dedup_files import HASHED, RecordFile, RecordWriter, merged
from megapoly.data.clean.stage import Stage
from megapoly.errors import ConfigError, DataError

BOTH = DedupSettings()
EXACT = DedupSettings(near=False)
NEAR = DedupSettings(exact=False)
QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
ALPHABET = [f"word{i}" for i in range(3000)]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def write(folder: Path, files: list[list[str]]) -> str:
    """A folder of JSONL files with these texts; ids are `file/line`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, texts in enumerate(files):
        lines = [json.dumps({"text": text, "id": f"{i}/{j}"}) + "\n" for j, text in enumerate(texts)]
        (folder / f"{i:03d}.jsonl").write_text("".join(lines))
    return str(folder)


def run(stage: Stage) -> None:
    """What an executor does with a stage, in this process."""
    for rank in range(stage.tasks):
        data = None
        for step in stage.steps:
            data = step(data, rank, stage.tasks)
        assert data is None


def drop(documents: str, work: Path, tasks: int) -> tuple[list[Document], list[tuple[Document, str]]]:
    kept, removed = [], []
    for rank in range(tasks):
        step = DropDuplicates(str(work), tasks, lambda document, reason: removed.append((document, reason)))
        kept += step(documents_reader(documents)(None, rank, tasks), rank, tasks)
    return kept, removed


def deduplicated(
    folder: Path, files: list[list[str]], tasks: int = 1, chosen: DedupSettings = BOTH
) -> tuple[list[str], dict[str, str]]:
    """The texts that stay, and by id why the others do not."""
    documents = write(folder / "documents", files)
    shutil.rmtree(folder / "work", ignore_errors=True)
    for stage in dedup_stages(documents, str(folder / "work"), tasks, chosen):
        run(stage)
    kept, removed = drop(documents, folder / "work", tasks)
    assert len(kept) + len(removed) == sum(bool(text) for texts in files for text in texts)
    return [document.text for document in kept], {document.id: reason for document, reason in removed}


def words(seed: int, size: int = 120) -> list[str]:
    return random.Random(seed).choices(ALPHABET, k=size)


def edited(tokens: list[str], *places: int) -> list[str]:
    return [f"new{i}" if i in places else token for i, token in enumerate(tokens)]


# ------------------------------------------------------------------------------------------------------- what stays

TEXTS = st.lists(st.text(st.sampled_from("ab. é漢\n"), min_size=1, max_size=4), max_size=12)


@settings(max_examples=40, **QUICK)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 5))
def test_exact_duplicates_are_found_all_and_nothing_else(tmp_path: Path, files: list[list[str]], tasks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "MERGED_RECORDS", 1)
        patch.setattr(dedup_files, "LEAST_SHARE", 2)
        kept, removed = deduplicated(tmp_path, files, tasks, EXACT)
    plain = Counter(" ".join(text.split()) for texts in files for text in texts)
    assert sorted(" ".join(text.split()) for text in kept) == sorted(plain)
    assert set(removed.values()) <= {"exact duplicate"}


@settings(max_examples=15, **QUICK)
@given(st.data())
def test_what_stays_depends_on_the_texts_alone(tmp_path: Path, data: st.DataObject) -> None:
    texts = []
    for seed in data.draw(st.lists(st.integers(0, 9), max_size=14)):
        tokens = words(seed)
        places = data.draw(st.lists(st.integers(0, 119), max_size=3))
        texts.append(" ".join(edited(tokens, *places)[data.draw(st.integers(0, 3)) :]))

    def outcome(name: str) -> list[str]:
        order = data.draw(st.permutations(texts))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(texts)), max_size=4)))
        files = [part.tolist() for part in np.split(np.array(order, dtype=object), cuts)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dedup, "TASKS_IN_RANGE", data.draw(st.integers(1, 3)))
            patch.setattr(dedup, "MERGED_RECORDS", 1)
            patch.setattr(dedup_files, "LEAST_SHARE", data.draw(st.integers(1, 9)))
            return sorted(deduplicated(tmp_path / name, files, data.draw(st.integers(1, 6)))[0])

    first = outcome("first")
    assert first == outcome("second")
    assert set(first) <= set(texts) and len(set(first)) == len(first)


@pytest.mark.parametrize("tasks", [1, 3])
def test_each_cluster_keeps_its_longest_text(tmp_path: Path, tasks: int) -> None:
    groups = [[edited(words(seed), 3 * seed)[i:] for i in range(4)] for seed in range(20)]
    texts = [" ".join(tokens) for group in groups for tokens in group]
    random.Random(0).shuffle(texts)
    kept, removed = deduplicated(tmp_path, [texts[:30], texts[30:40], texts[40:]], tasks)
    assert sorted(kept) == sorted(" ".join(group[0]) for group in groups)
    assert set(removed.values()) == {"near duplicate"} and len(removed) == 60


def test_of_equally_long_texts_the_order_does_not_decide(tmp_path: Path) -> None:
    texts = [" ".join([*words(1)[:50], letter, *words(1)[50:]]) for letter in "abcdef"]
    kept = {tuple(deduplicated(tmp_path, [texts[i:], texts[:i]], 2)[0]) for i in range(6)}
    assert len(kept) == 1 and len(kept.pop()) == 1


def test_a_chain_of_near_duplicates_is_one_cluster(tmp_path: Path) -> None:
    chain = [" ".join([*words(1, 300)[10 * i : 10 * i + 150]]) for i in range(8)]
    kept, _ = deduplicated(tmp_path, [chain], chosen=DedupSettings(bands=40, rows=3))
    assert len(kept) == 1


def test_reasons_tell_exact_from_near(tmp_path: Path) -> None:
    text, longer = " ".join(words(1)), " ".join([*words(1), "and", "more"])
    files = [[text, text.replace(" ", "\n"), "alone"], [longer, text, longer + " "]]
    kept, removed = deduplicated(tmp_path, files, 2)
    assert kept == ["alone", longer]
    assert removed == {"0/0": "near duplicate", "0/1": "exact duplicate", "1/1": "exact duplicate", "1/2": "exact duplicate"}  # fmt: skip
    assert deduplicated(tmp_path, files, 2, EXACT)[0] == [text, "alone", longer]
    kept, removed = deduplicated(tmp_path, files, 2, NEAR)
    assert kept == ["alone", longer] and set(removed.values()) == {"near duplicate"}


def test_composed_and_decomposed_letters_are_the_same(tmp_path: Path) -> None:
    kept, removed = deduplicated(tmp_path, [["caf\u00e9 한국", "cafe\u0301 \u1112\u1161\u11ab국"]])
    assert len(kept) == 1 and removed == {"0/1": "exact duplicate"}


def test_texts_without_words_and_short_ones_stay(tmp_path: Path) -> None:
    texts = ["!!!", "???", "🙂", "🙃", "yes", "no", "네", "是", "a b c", "a b d", "a b", "x"]
    assert deduplicated(tmp_path, [texts])[0] == texts


def test_settings_decide(tmp_path: Path) -> None:
    pairs = [" ".join(edited(words(seed, 150), *places)) for seed in range(30) for places in ([], [20, 60, 100])]
    kept = {
        name: len(deduplicated(tmp_path, [pairs], chosen=DedupSettings(**given))[0])
        for name, given in {"field": {}, "strict": {"rows": 30}, "lax": {"rows": 2}, "one": {"bands": 1},
                            "long": {"ngram": 40}, "short": {"ngram": 1}}.items()
    }  # fmt: skip
    assert 30 == kept["lax"] == kept["short"] <= kept["field"] < kept["one"] <= kept["strict"] <= 60
    assert kept["field"] < kept["long"]
    seeds = {tuple(deduplicated(tmp_path, [pairs], chosen=DedupSettings(bands=3, seed=seed))[0]) for seed in range(3)}
    assert len(seeds) == 3


def test_an_empty_corpus_and_empty_tasks_pass(tmp_path: Path) -> None:
    assert deduplicated(tmp_path, [[], []], 3) == ([], {})
    assert deduplicated(tmp_path, [["a"], ["a"]], 5) == (["a"], {"1/0": "exact duplicate"})


# ------------------------------------------------------------------------------------------- datatrove's executors


def on_executor(folder: Path, documents: str, tasks: int, workers: int) -> list[str]:
    stages = dedup_stages(documents, str(folder / "work"), tasks, BOTH)
    last = [documents_reader(documents), DropDuplicates(str(folder / "work"), tasks), JsonlWriter(str(folder / "kept"), compression=None)]  # fmt: skip
    for stage in [*stages, Stage("drop", tasks, last)]:
        logs = str(folder / "logs" / stage.name)
        LocalPipelineExecutor(stage.steps, tasks=stage.tasks, workers=min(workers, stage.tasks), logging_dir=logs).run()
    return [path.read_text() for path in sorted((folder / "kept").glob("*.jsonl"))]


def test_workers_do_not_matter_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    texts = [" ".join(edited(words(i % 25), i)) for i in range(60)]
    documents = write(tmp_path / "documents", [texts[:20], texts[20:25], texts[25:]])
    alone = on_executor(tmp_path / "alone", documents, 3, 1)
    assert 0 < sum(content.count("\n") for content in alone) < 60
    assert on_executor(tmp_path / "two", documents, 3, 2) == alone
    # As if it had been killed while task 1 of the first stage wrote: later stages and that task come again.
    one = tmp_path / "alone"
    for stage in ("buckets", "clusters", "drop"):
        shutil.rmtree(one / "logs" / stage)
    shutil.rmtree(one / "kept")
    (one / "logs" / "signatures" / "completions" / "00001").unlink()
    signatures = [one / "work" / "signatures" / f"{i:06d}.bin" for i in range(3)]
    signatures[1].rename(signatures[1].with_name("000001.bin.tmp"))
    before = [path.stat().st_mtime_ns for path in (signatures[0], signatures[2])]
    assert on_executor(one, documents, 3, 1) == alone
    assert [path.stat().st_mtime_ns for path in (signatures[0], signatures[2])] == before
    assert [path.name for path in (one / "work" / "signatures").iterdir() if path.suffix != ".bin"] == []


def test_stages_count_what_they_find(tmp_path: Path) -> None:
    text = " ".join(words(1))
    documents = write(tmp_path / "documents", [[text, text, text + " more", "else"]])
    stages = dedup_stages(documents, str(tmp_path / "work"), 1, BOTH)
    for stage in stages:
        run(stage)
    stats = {name: stat.total for name, stat in stages[2].steps[-1].stats.stats.items()}
    assert stats == {"documents": 4, "exact duplicates": 1, "near duplicates": 1}
    step = DropDuplicates(str(tmp_path / "work"), 1)
    assert len(list(step(documents_reader(documents)(None, 0, 1), 0, 1))) == 2
    assert {name: stat.total for name, stat in step.stats.stats.items()} == {
        "total": 4, "dropped": 2, "forwarded": 2, "dropped exact duplicate": 1, "dropped near duplicate": 1,
    }  # fmt: skip


def test_work_is_divided_among_tasks(tmp_path: Path) -> None:
    def tasks(n: int, chosen: DedupSettings = BOTH) -> list[int]:
        return [stage.tasks for stage in dedup_stages(str(tmp_path), str(tmp_path / "w"), n, chosen)]

    assert tasks(1) == [1, 1, 1] and tasks(8) == [8, 8, 1] and tasks(256) == [256, 15, 1]
    assert (
        tasks(257) == [257, 30, 1]
        and tasks(1000, EXACT) == [1000, 4, 1]
        and tasks(99_999)[1] == 64 * 15
        and tasks(100, NEAR) == [100, 14, 1]
    )


# ----------------------------------------------------------------------------------------------------------- files


@settings(max_examples=60, **QUICK)
@given(st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=40), max_size=5), st.integers(1, 30))
def test_merged_sections_are_in_order_and_whole(tmp_path: Path, sections: list[list[int]], least: int) -> None:
    streams = []
    for i, hashes in enumerate(sections):
        records = np.array([(h, j) for j, h in enumerate(sorted(hashes))], dtype=HASHED)
        with RecordWriter(tmp_path / "w" / f"{i}.bin") as writer:
            writer.section(np.arange(i))
            writer.section(records)
            writer.finish({})
        streams.append(RecordFile.open(tmp_path / "w" / f"{i}.bin", {}, "").stream(1, HASHED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup_files, "LEAST_SHARE", least)
        blocks = list(merged(streams, 1))
    found = [(int(r["hash"]), int(s), int(r["document"])) for records, sources in blocks for r, s in zip(records, sources, strict=True)]  # fmt: skip
    assert [h for h, _, _ in found] == sorted(h for hashes in sections for h in hashes)
    assert sorted((s, d) for _, s, d in found) == [(s, d) for s, hashes in enumerate(sections) for d in range(len(hashes))]  # fmt: skip
    assert all(len(records) <= least * len(sections) for records, _ in blocks), (
        "memory is bounded, also by equal hashes"
    )


CORPUS = [[" ".join(edited(words(i % 4, 30), i % 3)) for i in range(12)], ["one", "two", "one"]]
STAGES = ["signatures", "pairs", "duplicates"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    deduplicated(folder, CORPUS, 2)
    return folder


def go_on(folder: Path, after: str) -> None:
    """The stages behind that whose files are in a folder of `work`."""
    documents, work = str(folder / "documents"), str(folder / "work")
    for stage in dedup_stages(documents, work, 2, BOTH)[STAGES.index(after) + 1 :]:
        run(stage)
    drop(documents, folder / "work", 2)


@settings(max_examples=150, **QUICK)
@given(st.data())
def test_a_damaged_file_ends_in_one_error_that_names_it(finished: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(STAGES))
    path = data.draw(st.sampled_from(sorted((finished / "work" / kind).iterdir())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["cut", "flip", "longer", "empty"]))
    bad = {
        "cut": content[:place],
        "flip": content[:place] + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))]) + content[place + 1 :],
        "longer": content[:place] + b"\0" + content[place:],
        "empty": b"",
    }[damage]
    try:
        path.write_bytes(bad)
        with pytest.raises(DataError, match=f"{path} is damaged or cut short: remove {finished / 'work'}"):
            go_on(finished, kind)
    finally:
        path.write_bytes(content)
        go_on(finished, kind)


def test_every_bit_of_a_files_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "w" / "a.bin"
    with RecordWriter(path) as writer:
        writer.section(np.arange(5))
        writer.finish({"fact": 1})
    content = path.read_bytes()
    assert RecordFile.open(path, {"fact": 1}, "").read(0, np.int64).tolist() == [0, 1, 2, 3, 4]
    for bit in range(8 * 40, 8 * len(content)):
        path.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
        with pytest.raises(DataError, match=f"{path} is damaged"):
            RecordFile.open(path, {"fact": 1}, "")


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), RecordWriter(tmp_path / "w" / "a.bin") as writer:
        writer.section(np.arange(5))
        raise OSError("full")
    assert list((tmp_path / "w").iterdir()) == []


@pytest.mark.parametrize(
    "kind, stage", [("signatures", "signatures"), ("pairs", "buckets"), ("duplicates", "clusters")]
)
def test_a_missing_file_names_the_stage_that_makes_it(finished: Path, kind: str, stage: str) -> None:
    path = finished / "work" / kind / "000001.bin"
    path.rename(path.with_suffix(".away"))
    try:
        with pytest.raises(DataError, match=f"{path} is missing: the stage '{stage}'"):
            go_on(finished, kind)
    finally:
        path.with_suffix(".away").rename(path)


def test_files_of_other_settings_are_refused(finished: Path) -> None:
    documents, work = str(finished / "documents"), str(finished / "work")
    for given_, tasks, text in (
        ({"ngram": 4}, 2, "ngram 5, this run has 4"),
        ({"seed": 9}, 2, "seed 1, this run has 9"),
        ({"near": False}, 2, "near True, this run has False"),
        ({}, 3, "tasks 2, this run has 3"),
    ):
        stages = dedup_stages(documents, work, tasks, DedupSettings(**given_))
        for stage in stages[1:]:
            with pytest.raises(DataError, match=f"was made with {text}: give the same again or remove {work}"):
                run(stage)
    with pytest.raises(DataError, match="tasks 2, this run has 3"):
        drop(documents, finished / "work", 3)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_documents_are_read_whole_or_not_at_all(tmp_path: Path, ending: str) -> None:
    texts = ["first", "", "\u2028 one line \x85", "last"] + [f"{i} " * 50 for i in range(4000)]
    content = "".join(json.dumps({"text": text, "id": str(i), "lang": "en"}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)).encode()  # fmt: skip
    packed = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[ending](content)
    path = tmp_path / "below" / f"a{ending}"
    path.parent.mkdir()
    path.write_bytes(packed)
    (tmp_path / "b.txt").write_text("not this")
    found = list(documents_reader(str(tmp_path))(None, 0, 1))
    assert [document.text for document in found] == [text for text in texts if text]
    assert found[1].id == "2" and found[1].metadata["lang"] == "en"
    path.write_bytes(packed[: -len(packed) // 3])
    with pytest.raises(DataError, match=f"{path}.*(truncated|line)"):
        list(documents_reader(str(tmp_path))(None, 0, 1))


def test_much_of_the_same_is_no_bomb(tmp_path: Path) -> None:
    line = json.dumps({"text": "the same " * 100_000}).encode() + b"\n"
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line * 100))
    assert sum(1 for _ in documents_reader(str(tmp_path))(None, 0, 1)) == 100


@pytest.mark.parametrize("line", ["{", "[1]", '{"id": "1"}', '{"text": 5}', '{"text": null}', '{"text": "\\ud800"}'])
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=f"{tmp_path / 'a.jsonl'}, line 2: .*; write this file again"):
        list(documents_reader(str(tmp_path))(None, 0, 1))


@pytest.mark.parametrize("change", ["one more", "one less", "another", "none"])
def test_documents_that_changed_are_noticed(tmp_path: Path, finished: Path, change: str) -> None:
    more = {"one more": [*CORPUS[1], "x"], "one less": CORPUS[1][:-1], "another": ["one", "three", "one"], "none": []}
    documents = write(tmp_path / "documents", [CORPUS[0], more[change]])
    with pytest.raises(DataError, match="the documents of task 1 are not those compared"):
        drop(documents, finished / "work", 2)


def test_a_stage_of_another_size_is_refused(finished: Path) -> None:
    with pytest.raises(ConfigError, match="listed for 2 tasks, this stage has 4"):
        list(DropDuplicates(str(finished / "work"), 2)(iter(()), 0, 4))


@pytest.mark.parametrize(
    "given_, text",
    [
        ({"exact": False, "near": False}, "neither exact nor near"),
        ({"ngram": 0}, "ngram of deduplication is 0"),
        ({"bands": -1}, "bands of deduplication is -1"),
        ({"rows": 0}, "rows of deduplication is 0"),
        ({"seed": -1}, "seed of deduplication is -1"),
        ({"seed": 2**64}, "seed of deduplication is 18446744073709551616"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(given_: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DedupSettings(**given_)


def test_ranges_cover_all_hashes(tmp_path: Path) -> None:
    # Sections of one band, cut into many ranges, hold every document once, in order and in the right range.
    documents = write(tmp_path / "documents", [[" ".join(words(i, 20)) for i in range(200)]])
    plan = Plan(tmp_path / "work", 7, BOTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "TASKS_IN_RANGE", 1)
        run(Stage("s", 1, [documents_reader(documents), dedup.WriteSignatures(plan)]))
        file = plan.open_signatures(0)
        for kind in range(15):
            parts = [file.read(1 + 7 * kind + i, HASHED) for i in range(7)]
            for i, part in enumerate(parts):
                assert ((part["hash"].astype(float) * 7 // 2**64).astype(int) == i).all() and 10 < len(part) < 60
            whole = np.concatenate(parts)
            assert (np.diff(whole["hash"].astype(float)) >= 0).all()
            assert sorted(whole["document"]) == list(range(200))
