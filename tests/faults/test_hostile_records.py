"""What a run writes beside its checkpoints, and what commands read again, comes from strangers too: one line, nothing else."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hostile import HUGE, VALUES, altered, doctored, fuzz, payload, refuses
from test_hostile_files import DEEP, SECONDS, home, mark, read_all, sound, step_folder  # noqa: F401
from tiny_runs import tiny_config, tiny_prepared

from megapoly.checkpoint.folders import LATEST, find_folders, remove, step_folders, sweep
from megapoly.checkpoint.rollbacks import NAME, level_rollbacks, read_rollbacks, write_rollbacks
from megapoly.checks import check
from megapoly.config import load_config
from megapoly.data.realised import describe_shares, read_steps, share_report
from megapoly.hf.export import MANIFEST, _require_replaceable
from megapoly.train.prepare import with_start
from megapoly.train.replay import compared, prepared_before, recorded

NO_JSON = [b"", b"\xff\xfe\0", DEEP, b'{"a":' * 100_000, b"9" * 5000, b"[1e999]", b'"\\ud800"', b"null"]
ROLLBACK = {"step": 9, "why": "the loss", "to": 6, "begin": 48, "end": 80}


# -------------------------------------------------------------------------------------------------------- `latest`


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"../../../etc", b"step_00000002/../../..", b"/etc/passwd", b"step_00000002\0", b"step_" + b"9" * 5000,
     b"step_" + b"9" * 200, b"x" * 10**6, payload(Path("executed"))],
)  # fmt: skip
def test_latest_is_the_name_of_a_folder_and_no_path(content: bytes, home: Path) -> None:  # noqa: F811
    (home / "run/checkpoints" / LATEST).write_bytes(content)
    message = refuses(lambda: find_folders(home / "run"))
    assert LATEST in message
    assert refuses(lambda: with_start(tiny_prepared(tiny_config(home, "gpt2", 2, num_layers=1)), {})) == message


def test_latest_that_is_no_file_is_refused(home: Path, tmp_path: Path) -> None:  # noqa: F811
    pointer = home / "run/checkpoints" / LATEST
    pointer.unlink()
    for make in (pointer.mkdir, lambda: pointer.symlink_to(pointer)):
        make()
        assert LATEST in refuses(lambda: find_folders(home / "run"))
        pointer.rmdir() if not pointer.is_symlink() else pointer.unlink()


def test_names_of_folders_that_no_run_gives_are_not_looked_at(home: Path, tmp_path: Path) -> None:  # noqa: F811
    root = home / "run/checkpoints"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (root / "step_00000009x").mkdir()
    (root / ("step_" + "9" * 200)).mkdir()
    os.symlink(tmp_path / "precious", root / ".step_00000009.ab.old")
    os.symlink(tmp_path / "precious/file", root / ".step_00000009.ac.tmp")
    assert [folder.name for folder in step_folders(root)] == ["step_00000002", "step_00000001"]
    os.symlink(tmp_path / "precious", root / "step_00000007")
    sweep(root)
    remove(root / "step_00000007", "ab")
    assert (tmp_path / "precious/file").exists()
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------------------- rollbacks.json


@pytest.mark.parametrize("content", NO_JSON)
def test_a_record_of_rollbacks_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    assert NAME in refuses(lambda: read_rollbacks(tmp_path))


@pytest.mark.parametrize("key", ROLLBACK)
def test_values_of_rollbacks_that_cannot_be(key: str, tmp_path: Path) -> None:
    for value in VALUES:
        if isinstance(value, str) and key == "why":
            continue
        (tmp_path / NAME).write_text(json.dumps([ROLLBACK | {key: value}]))
        message = refuses(lambda: read_rollbacks(tmp_path))
        is_count = key != "why" and type(value) is int and 0 <= value < 2**62
        is_sound = is_count and (key != "begin" or value < 80) and (key != "end" or value > 48)
        assert (message == "") == is_sound and (is_sound or NAME in message), (key, value)


def test_a_reason_that_is_no_text_can_be_kept(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    roots[0].mkdir()
    (roots[0] / NAME).write_text(json.dumps([ROLLBACK | {"why": "\ud800\x1b[2J"}]))
    level_rollbacks(roots, True)
    write_rollbacks(roots[0], read_rollbacks(roots[1]))
    assert read_rollbacks(roots[0]) == read_rollbacks(roots[1])


def test_fuzzed_rollbacks_and_their_use(home: Path) -> None:  # noqa: F811
    cfg = tiny_config(home, "gpt2", 2, num_layers=1)
    path = home / "run/checkpoints" / NAME

    def use() -> None:
        prepared = with_start(tiny_prepared(cfg), {})
        prepared.leaves_out(2)
        prepared_before(prepared, 2)

    def attempt(rng: random.Random) -> None:
        before = [ROLLBACK | {"begin": rng.randrange(20), "end": rng.randrange(40)}] * rng.randint(1, 2)
        forged = json.dumps(doctored(before, rng)).encode()
        path.write_bytes(forged if rng.random() < 0.7 else altered(forged, rng))
        refuses(use)

    fuzz(attempt, SECONDS)


# -------------------------------------------------------------------------------------------------------- metrics.jsonl


def rows_of(home: Path) -> list[dict[str, Any]]:  # noqa: F811
    return [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]


def replayed(path: Path) -> str:
    again = {"loss": 2.0, "loss_by_source": {"en": 1.0, "ko": float("nan")}, "grad_norm": 3.0}
    return compared(again, recorded(path, 2))


@pytest.mark.parametrize("content", NO_JSON)
def test_rows_that_are_none_are_passed_over_by_a_replay(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        content + b'\n{"step": 2, "loss": 2.0, "loss_by_source": {"en": 1.0, "ko": null}, "grad_norm": 3.0}\n'
    )
    assert replayed(path) == "equal to its row of metrics.jsonl"


@pytest.mark.parametrize("key", ["loss", "loss_by_source", "grad_norm"])
def test_values_of_a_row_that_are_none_differ_from_what_was_computed(key: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {"step": 2, "loss": 2.0, "loss_by_source": {"en": 1.0, "ko": None}, "grad_norm": 3.0}
    for value in VALUES:
        path.write_text(json.dumps(row | {key: {"en": value} if key == "loss_by_source" else value}) + "\n")
        said = replayed(path)
        assert (said.startswith("differs from its row: ") and len(said) < 1000) or value == 1, value


def test_fuzzed_rows_of_a_run(home: Path) -> None:  # noqa: F811
    plan = tiny_prepared(tiny_config(home, "gpt2", 2, num_layers=1)).plan
    rows, path = rows_of(home), home / "run/metrics.jsonl"

    def report() -> None:
        describe_shares(share_report(plan, read_steps(path, plan)))

    assert refuses(report) == ""

    def attempt(rng: random.Random) -> None:
        forged = "".join(json.dumps(row) + "\n" for row in doctored(rows, rng) or []).encode()
        path.write_bytes(forged if rng.random() < 0.7 else altered(forged, rng))
        refuses(report)
        recorded(path, 2)

    fuzz(attempt, SECONDS)


@pytest.mark.parametrize("huge", HUGE)
def test_numbers_of_rows_beyond_any_run_are_refused(huge: int, home: Path) -> None:  # noqa: F811
    plan = tiny_prepared(tiny_config(home, "gpt2", 2, num_layers=1)).plan
    path, both = home / "run/metrics.jsonl", rows_of(home)

    def said(rows: list[dict[str, Any]], key: str, value: Any) -> str:
        path.write_text("".join(json.dumps(row | {key: value}) + "\n" for row in rows))
        return refuses(lambda: share_report(plan, read_steps(path, plan)))

    where = "metrics.jsonl, line"
    assert where in said(both, "step", huge) and where in said(both, "samples", huge)
    assert where in said(both[:1], "step", huge) or huge < 2**60  # one row may be of any step
    assert where in said(both, "tokens_by_source", {"en": 2**63}) and where in said(
        both, "loss_by_source", {"en": 10**400}
    )


# ------------------------------------------------------------------------------------------------ exports and configurations


@pytest.mark.parametrize(
    "content", [*NO_JSON, b'{"files": 3}', b'{"files": [["a"]]}', b'{"files": {}}', b'{"files": "notes.txt"}', b'{"files": ["../out/notes.txt"]}']
)  # fmt: skip
def test_an_export_replaces_nothing_for_a_doctored_manifest(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / MANIFEST).write_bytes(content)
    assert str(tmp_path) in refuses(lambda: _require_replaceable(tmp_path))


def test_an_export_replaces_no_folder_that_its_manifest_names(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / MANIFEST).write_text(json.dumps({"files": ["thesis"]}))
    assert "thesis" in refuses(lambda: _require_replaceable(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]", "model: &m {x: *m}", "&m model: *m", "model: &m\n  <<: *m", "? [a]\n: 1", "1: 2", "model: {num_layers: 1:30}",
     "--- {}\n--- {}", "%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !name:os.system", "model: {hidden_size: .nan}",
     "model: {hidden_size: 1e400}", "train: {seed: -9999999999999999999999}", "data: {data_root: \"\\ud800\"}",
     "data: {sources: [{name: \"\\ud800\", language: en, paths: [x]}]}", "data: {sources: [{name: \"a\\nb\\e[2J\", language: en}]}",
     "{" * 100_000, "model:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 2000)), "model: {num_layers: 1, num_layers: 2}",
     "curriculum: {stages: [{name: a, tokens: 1e999}]}", "data: {sources: {a: b}}", "- 1", "x", ""],
)  # fmt: skip
def test_configurations_that_cannot_be_meant(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = refuses(lambda: check(load_config(str(path), {}), 1))
    message.encode()
    assert message != "" or text == ""


def test_merged_aliases_take_no_time(tmp_path: Path) -> None:
    lines = ["l0: &l0 {" + ", ".join(f"k{i}: x" for i in range(9)) + "}"]
    lines += [f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * 9)}], m{i}: x}}" for i in range(1, 30)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "model: *l29"]))
    assert refuses(lambda: check(load_config(str(tmp_path / "c.yaml"), {}), 1)) != ""


def test_a_step_folder_that_is_a_link_elsewhere_is_read_and_never_written(home: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = step_folder(home)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    assert refuses(lambda: read_all(home)) == ""
    for name in ("state.json", "shard_00000.safetensors"):
        (tmp_path / "elsewhere" / name).unlink()
        (tmp_path / "elsewhere" / name).symlink_to("/dev/zero")  # without an end
        assert name in refuses(lambda: read_all(home))
        (tmp_path / "elsewhere" / name).unlink()
        (tmp_path / "elsewhere" / name).write_bytes(before[name])
