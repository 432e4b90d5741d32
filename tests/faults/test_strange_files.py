"""What is no file of a checkpoint, or one of another kind or size, is named in a line; other checkpoints are seen still."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import little_memory, refuses
from tiny_runs import reseal, run_to_end, tiny_config, tiny_prepared

from megapoly.checkpoint.folders import LATEST, find_folders, read_latest
from megapoly.checkpoint.load import CheckpointReader
from megapoly.checkpoint.report import listed, listing, verify
from megapoly.checkpoint.rollbacks import NAME, read_rollbacks
from megapoly.checkpoint.storage import FORMAT, read_contents
from megapoly.errors import CheckpointError, DamageError
from megapoly.parallel.mesh import single_process_mesh
from megapoly.tokenizer.load import load_tokenizer
from megapoly.train.prepare import with_start

TOOL = Path(__file__).parents[2] / "tools/checkpoint.py"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    run_to_end(single_process_mesh(), tiny_config(folder, "gpt2", 3, num_layers=1, save_interval=1))
    return folder


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "home")
    return tmp_path / "home/run/checkpoints"


def start_of(root: Path) -> tuple[int, list[str]]:
    """The step from which the run of a directory of checkpoints would go on, and what it passes over for it."""
    cfg = tiny_config(root.parents[1], "gpt2", 3, num_layers=1)
    prepared = with_start(tiny_prepared(cfg), {})
    return prepared.start_step, list(prepared.skipped.values())


def test_a_bit_flipped_anywhere_in_the_format_or_near_an_end_is_damage(root: Path) -> None:
    path = root / "step_00000003/metadata.json"
    content = path.read_bytes()
    assert FORMAT.encode() in content[:60]
    for at in (*range(60), *range(-30, 0)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(DamageError):
                read_contents(path.parent)
    assert start_of(root)[0] == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b'"text"', b"{" * 10**5])
def test_metadata_that_is_none_is_passed_over(content: bytes, root: Path) -> None:
    (root / "step_00000003/metadata.json").write_bytes(content)
    step, skipped = start_of(root)
    assert step == 2 and len(skipped) == 1 and "step_00000003/metadata.json" in skipped[0]


def test_another_format_with_its_checksum_is_refused(root: Path) -> None:
    reseal(root / "step_00000003", {"format": "megapoly-checkpoint-9"})
    with pytest.raises(CheckpointError, match="'megapoly-checkpoint-9', .* read it with the version that wrote it"):
        start_of(root)


@pytest.mark.parametrize("how", ["copy", "link"])
def test_a_folder_with_the_content_of_another_step_is_passed_over(how: str, root: Path) -> None:
    shutil.rmtree(root / "step_00000003")
    if how == "copy":
        shutil.copytree(root / "step_00000001", root / "step_00000003")
    else:
        (root / "step_00000003").symlink_to("step_00000001")
    step, skipped = start_of(root)
    assert step == 2 and "entry 'step' is 1, the folder is step_00000003" in skipped[0]


# --------------------------------------------------------------------------------------------------- kinds and sizes


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 * 10**9)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [pipe, endless, sparse, folder])
def test_small_files_that_are_none_are_neither_waited_for_nor_taken_into_memory(
    make: Callable[[Path], None], root: Path
) -> None:
    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    replace(root / "step_00000003/metadata.json")
    with pytest.raises(DamageError, match="metadata.json"):
        read_contents(root / "step_00000003")
    assert start_of(root)[0] == 2
    replace(root / "step_00000002/state.json")
    assert start_of(root)[0] == 1
    replace(root / NAME)
    assert NAME in refuses(lambda: read_rollbacks(root))
    replace(root / LATEST)
    assert "remove it to go on from the newest" in refuses(lambda: read_latest(root))


def test_a_forged_size_of_a_sparse_file_takes_no_memory(root: Path) -> None:
    folder = root / "step_00000003"
    sparse(folder / "tokenizer.model")
    os.truncate(folder / "tokenizer.model", 2 * 2**30)
    files = json.loads((folder / "metadata.json").read_text())["files"]
    reseal(folder, {"files": files | {"tokenizer.model": [2 * 2**30, 1, 2 * 2**30]}})
    assert "tokenizer.model: its checksum does not fit" in refuses(lambda: CheckpointReader.at(folder).tokenizer_path)


def test_a_chunk_of_holes_beyond_the_memory_is_named(root: Path) -> None:
    folder, size = root / "step_00000003", 40 * 10**9
    sparse(folder / "shard_00077.safetensors")
    tree = json.loads((folder / "metadata.json").read_text())
    chunk = [[0], [size // 4], "shard_00077.safetensors", 0, 0]
    record = {"dtype": "float32", "shape": [size // 4], "chunks": [chunk]}
    files = tree["files"] | {"shard_00077.safetensors": [size, 0, 0]}
    reseal(folder, {"files": files, "tensors": tree["tensors"] | {"z": record}})
    with little_memory():
        (problem,) = verify(folder)
    assert "shard_00077.safetensors: 'z' at (0,) has 40,000,000,000 bytes, more than this host" in problem


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [pipe, endless, sparse, folder])
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_tokenizers_that_are_no_files_of_a_tokenizer(kind: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    make(path)
    message = refuses(lambda: load_tokenizer(kind, str(path)))
    assert message.startswith(f"{path}") and "tokenizer_model" in message


# --------------------------------------------------------------------------------------------------------- the tool


def tool(*words: object) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, words)], capture_output=True, text=True, timeout=100, check=False
    )
    assert "Traceback" not in done.stderr and done.stderr == "", done.stderr
    return done.returncode, done.stdout.splitlines()


def test_verify_all_goes_on_after_damage(root: Path) -> None:
    (root / "step_00000009").mkdir()
    (root / "step_00000003/metadata.json").unlink()
    (root / "step_00000002/metadata.json").unlink()
    (root / "step_00000002/metadata.json").mkdir()
    (root / LATEST).write_text("")
    status, lines = tool("verify", root.parent, "--all")
    assert status == 2 and [": DAMAGED: " in line for line in lines] == [True, True, True, True, False]
    assert lines[0].startswith(f"{root / LATEST}: ") and lines[-1] == f"{root / 'step_00000001'}: whole"
    entries = [json.loads(line) for line in tool("verify", root.parent, "--all", "--json")[1]]
    assert [bool(entry["problems"]) for entry in entries] == [True, True, True, True, False]
    assert len([listed(entry) for entry in listing(root)]) == 5
    assert verify(find_folders(root / "step_00000003")[0]) == [
        f"{root / 'step_00000003/metadata.json'}: missing; the folder is not a finished checkpoint"
    ]


def test_verify_all_misses_a_folder_that_latest_names(root: Path) -> None:
    shutil.rmtree(root / "step_00000003")
    problems = [verify(Path(entry["folder"])) for entry in listing(root)]
    assert [len(found) for found in problems] == [1, 0, 0] and "step_00000003" in problems[0][0]


@pytest.mark.parametrize("name", ["a" * 300, "\udc80", "\ud800"])
def test_names_of_files_that_a_disk_cannot_have_are_damage(name: str, root: Path) -> None:
    folder = root / "step_00000003"
    files = json.loads((folder / "metadata.json").read_text())["files"]
    reseal(folder, {"files": files | {name: [1, 0, 1]}})
    assert start_of(root)[0] == 2
    for status, words in ((0, ("list", root)), (2, ("verify", root, "--all"))):
        found, lines = tool(*words)
        assert found == status and ["DAMAGED" in line for line in lines] == [True, False, False]
    if name == "\udc80":  # a byte that is no UTF-8, of a file that is there and has another checksum
        (folder / name).write_bytes(b"x")
        assert tool("show", folder)[0] == 0
        cfg = tiny_config(root.parents[1], "gpt2", 3, num_layers=1)
        run_to_end(single_process_mesh(), cfg)
        assert "DAMAGED" not in tool("list", root)[1][0]


def test_names_of_tensors_that_are_no_unicode_are_shown(root: Path) -> None:
    folder = root / "step_00000003"
    tree = json.loads((folder / "metadata.json").read_text())
    _, _, begin = tree["files"]["shard_00000.safetensors"]
    empty = {"dtype": "float32", "shape": [0], "chunks": [[[0], [0], "shard_00000.safetensors", begin, 0]]}
    reseal(folder, {"tensors": tree["tensors"] | {"\ud800x": empty}})
    status, lines = tool("show", folder)
    assert status == 0 and r"  \ud800x  (0,) float32, 1 chunks" in lines


@pytest.mark.parametrize("layout", [3, None, [], {"tp": []}])
def test_a_run_is_listed_whatever_a_layout_is(layout: object, root: Path) -> None:
    path = root / "step_00000003/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": layout}))
    reseal(path.parent)
    assert [listed(entry).count("DAMAGED") for entry in listing(root)] == [0, 0, 0]


# ------------------------------------------------------------------------------------- forged entries, a run's records


@pytest.mark.parametrize(
    ("name", "value"),
    [("data", None), ("data", 3), ("data", {"tokenizer": 3}), ("lr_decay_iters", [[[]]]), ("lr_decay_iters", -1),
     ("skipped_steps", -1), ("skipped_steps", 10**18), ("skipped_in_a_row", 1)],
)  # fmt: skip
def test_forged_entries_of_a_state_are_refused(name: str, value: object, root: Path) -> None:
    folder = root / "step_00000003"
    state = json.loads((folder / "state.json").read_text())
    holder = state["watch"] if name.startswith("skipped") else state
    holder[name] = value
    (folder / "state.json").write_text(json.dumps(state))
    reseal(folder)

    def resume() -> None:
        start_of(root)
        _ = CheckpointReader.at(folder).watch

    assert refuses(resume).startswith(f"{folder / 'state.json'}: entry '{name if holder is state else 'watch'}' is")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_record_of_a_run_that_is_a_folder_gives_one_line(name: str, root: Path) -> None:
    shutil.rmtree(root / "step_00000003")
    (root / LATEST).unlink()
    (root.parent / name).unlink()
    (root.parent / name).mkdir()
    cfg = tiny_config(root.parents[1], "gpt2", 3, num_layers=1)
    message = refuses(lambda: run_to_end(single_process_mesh(), cfg))
    assert message == f"{root.parent / name}: cannot be written: Is a directory"


def test_damaged_rows_are_told_of(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = root.parent / "metrics.jsonl"
    rows.write_bytes(rows.read_bytes().replace(b'"step": 2', b'"step: 2'))
    shutil.rmtree(root / "step_00000003")
    (root / LATEST).unlink()
    run_to_end(single_process_mesh(), tiny_config(root.parents[1], "gpt2", 3, num_layers=1))
    assert f"warning: {rows}: 1 damaged lines were dropped" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ permissions


@pytest.mark.parametrize("name", ["metadata.json", "state.json", "shard_00000.safetensors"])
def test_what_this_user_may_not_read_is_no_damage(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user meets it; root, as whom tests may run, may read everything."""
    path = root / "step_00000003" / name

    def refusing(real: Callable[..., Any], target: object, *args: Any, **kwargs: Any) -> Any:
        if Path(str(target)) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(target, *args, **kwargs)

    real_open, real_path_open = os.open, Path.open
    monkeypatch.setattr(os, "open", lambda *args, **kwargs: refusing(real_open, *args, **kwargs))
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: refusing(real_path_open, *args, **kwargs))
    problems = verify(path.parent)
    assert len(problems) == 1 and "Permission denied; let this user read it" in problems[0]
    if name != "shard_00000.safetensors":
        with pytest.raises(CheckpointError) as caught:
            start_of(root)
        assert not isinstance(caught.value, DamageError) and str(path) in str(caught.value)
