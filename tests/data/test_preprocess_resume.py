"""A run that is killed anywhere and called again ends with the bytes of one that was not; nothing half looks whole."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megapoly.data import indexed, resume, text_input
from megapoly.data import preprocess as preprocess_module
from megapoly.data.indexed import IndexedDataset
from megapoly.data.preprocess import Summary, preprocess
from megapoly.data.resume import only_writer
from megapoly.data.templates import Template
from megapoly.errors import DataError
from megapoly.tokenizer.train import train_sentencepiece

TYPE = "SentencePieceTokenizer"
TEXTS = [f"document {i} says: 안녕 {'word ' * (i % 11)}\n{i * i}" for i in range(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    train_sentencepiece(TEXTS, path, 300)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 900)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # it outlives a power cut; what is killed here needs none


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    import gzip

    lines = [json.dumps({"id": i, "text": text, "lang": "en"}).encode() + b"\n" for i, text in enumerate(TEXTS)]
    lines[30:30] = [b"oops\n"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:70]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[70:]), mtime=0))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]


def run(inputs: list[str], folder: Path, model: str, **changes: Any) -> Summary:
    options: dict[str, Any] = {
        "append_eod": True, "valid_fraction": 0.3, "on_bad_line": "skip", "checkpoint_seconds": 0.0, "log_interval": 0,
        "tokenizer_backend": "sentencepiece", "shuffle_seed": 5,
    } | changes  # fmt: skip
    folder.mkdir(exist_ok=True)
    return preprocess(inputs, str(folder / "p"), TYPE, model, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a forked child that does this; -9 where it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(event: int) -> None:
    """Kill this process at its so-and-so-manieth write, sync, rename or removal; a write ends half-way."""
    left = event

    def counted(function: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if half:
                    function(arguments[0], bytes(arguments[1])[: len(bytes(arguments[1])) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for where, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (Path, "unlink"), (os, "rmdir")):
        setattr(where, name, counted(getattr(where, name)))
    indexed._write = counted(indexed._write, half=True)


def check_nothing_half(folder: Path, expected: dict[str, bytes]) -> None:
    """What has both of its names is whole."""
    for name in {Path(n).stem for n in content(folder) if n.endswith(".idx")}:
        if (folder / f"{name}.bin").exists():
            IndexedDataset(str(folder / name))
            assert (folder / f"{name}.bin").read_bytes() == expected[f"{name}.bin"]


def test_what_is_replaced_is_said_first_and_only_text_that_was_encoded_has_a_speed(
    inputs: list[str], tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "out", list[str]()
    options: dict[str, Any] = {"log": said.append, "log_interval": 10**9}
    assert "MB/s" in str(run(inputs, out, model, **options)) and not any("replaced" in line for line in said)
    with monkeypatch.context() as patch:
        patch.setattr(preprocess_module, "publish", lambda *_: os._exit(9))
        assert in_child(lambda: run(inputs, out, model, pack_length=40, **options)) == 9
    said.clear()
    assert "MB/s" not in str(run(inputs, out, model, pack_length=40, **options))
    names = [f"{out}/p_text_document", f"{out}/p_valid_text_document"]
    assert said[1:3] == [f"{name}: is there already and will be replaced when all is done" for name in names]


@pytest.mark.parametrize(
    ("seed", "pack"), [(None, None), (5, None), (5, 40)], ids=["input order", "shuffled", "packed"]
)
def test_killed_at_every_step_it_ends_with_the_same_bytes(
    tmp_path: Path, model: str, inputs: list[str], seed: int | None, pack: int | None
) -> None:
    whole = run(inputs, tmp_path / "whole", model, shuffle_seed=seed, pack_length=pack)
    expected = content(tmp_path / "whole")
    names = [f"p_{side}text_document.{kind}" for side in ("", "valid_") for kind in ("bin", "idx")]
    assert sorted(expected) == sorted([*names, *(["p_text_document.pack.json"] if pack else [])])
    event, step = 1, 1
    while True:
        folder = tmp_path / f"k{event}"

        def work(event: int = event, folder: Path = folder) -> None:
            kill_at(event)
            run(inputs, folder, model, shuffle_seed=seed, pack_length=pack)

        if in_child(work) == 0:
            break
        check_nothing_half(folder, expected)
        again = run(inputs, folder, model, shuffle_seed=seed, pack_length=pack)
        assert content(folder) == expected, event
        assert (again.languages, again.bad_lines) == (whole.languages, whole.bad_lines)
        assert list(again.packings.values()) == list(whole.packings.values())
        assert [path.name for path in folder.iterdir() if path.is_dir()] == []
        event += step
        step = 1 + event // 12
    assert event > 40


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path, model: str, inputs: list[str]) -> None:
    run(inputs, tmp_path / "whole", model)
    folder, chance = tmp_path / "k", random.Random(1)
    killed = 0
    while True:

        def work(event: int = chance.randint(8, 60)) -> None:
            kill_at(event)
            run(inputs, folder, model)

        folder.mkdir(exist_ok=True)
        if in_child(work) == 0:
            break
        killed += 1
        check_nothing_half(folder, content(tmp_path / "whole"))
    assert killed > 3
    assert content(folder) == content(tmp_path / "whole")


def test_processes_killed_at_random_moments(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_input, "CHUNK_BYTES", 1 << 20)
    lines = [json.dumps({"id": i, "text": TEXTS[i % 120]}) + "\n" for i in range(30_000)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    run([str(tmp_path / "a.jsonl")], tmp_path / "whole", model)
    code = (
        "import sys; from megapoly.data.preprocess import preprocess\n"
        f"if __name__ == '__main__': preprocess([{str(tmp_path / 'a.jsonl')!r}], {str(tmp_path / 'k' / 'p')!r}, {TYPE!r},"
        f" {model!r}, append_eod=True, valid_fraction=0.3, on_bad_line='skip', checkpoint_seconds=0.0, shuffle_seed=5,"
        " workers=2, tokenizer_backend='sentencepiece', log_interval=1, log=lambda line: print(line, flush=True))\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script)]
    chance = random.Random(2)
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        process.stdout.readline()
        if "interrupted" in process.stdout.readline():
            process.stdout.readline()
        time.sleep(chance.uniform(0, 0.7))
        process.kill()
        process.wait()
        process.stdout.read()  # which ends when the workers have left as well
        process.stdout.close()
    subprocess.run(command, env=environment, check=True, timeout=100, stdout=subprocess.DEVNULL)
    assert content(tmp_path / "k") == content(tmp_path / "whole")


def test_nothing_has_its_name_before_it_is_on_the_disk(
    tmp_path: Path, model: str, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[str, int] = {}
    replace = os.replace

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        synced[path] = os.fstat(handle).st_size

    def checked(old: Any, new: Any) -> None:
        assert synced[str(old)] == os.path.getsize(old), f"{old} was renamed before it was on the disk"
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", checked)
    for seed in (None, 5, 6):
        run(inputs, tmp_path / f"{seed}", model, shuffle_seed=seed, pack_length=40 if seed == 6 else None)
        assert synced.pop(str(tmp_path / f"{seed}"), None) is not None
        assert str(tmp_path / f"{seed}" / "p.partial" / "text.lengths") in synced


def test_an_older_index_never_meets_new_tokens(tmp_path: Path, model: str, inputs: list[str]) -> None:
    folder = tmp_path / "k"
    run(inputs[:1], folder, model)
    replace = os.replace

    def work() -> None:
        def killed(old: Any, new: Any) -> None:
            if str(new).endswith("p_text_document.idx"):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(old, new)

        os.replace = killed  # type: ignore[assignment]
        run(inputs, folder, model)

    assert in_child(work) == -signal.SIGKILL
    assert (folder / "p_text_document.bin").exists() and not (folder / "p_text_document.idx").exists()
    run(inputs, folder, model)
    run(inputs, tmp_path / "whole", model)
    assert content(folder) == content(tmp_path / "whole")


def interrupt(inputs: list[str], folder: Path, model: str, event: int = 12, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)

    def work() -> None:
        kill_at(event)
        run(inputs, folder, model, **changes)

    assert in_child(work) == -signal.SIGKILL
    assert (folder / "p.partial" / "state.json").exists()


def test_what_was_done_is_not_done_again(tmp_path: Path, model: str, inputs: list[str]) -> None:
    interrupt(inputs, tmp_path / "k", model, 25)
    said: list[str] = []
    run(inputs, tmp_path / "k", model, log_interval=1, log=said.append)
    assert any("going on behind" in line for line in said)
    state = said[1].split()
    assert int(state[3]) > 10


def test_changed_inputs_and_flags_are_refused_with_the_difference(
    tmp_path: Path, model: str, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "k"
    interrupt(inputs, folder, model)
    for changes, words in (
        ({"shuffle_seed": 6}, "begun with shuffle_seed 5 instead of 6"),
        ({"pack_length": 40}, "begun with pack_length None instead of 40"),
        ({"valid_fraction": 0.1}, "valid_fraction 0.3 instead of 0.1"),
        ({"append_eod": False}, "begun with after"),
        ({"templates": [Template.parse("text=>{text}")]}, "begun with templates"),
    ):
        with pytest.raises(DataError, match=words):
            run(inputs, folder, model, **changes)
    with pytest.raises(DataError, match="begun with 2 inputs instead of 1"):
        run(inputs[:1], folder, model)
    with pytest.raises(DataError, match=r"the input .*b\.jsonl\.gz stands where .*a\.jsonl stood"):
        run(inputs[::-1], folder, model)
    with open(inputs[0], "ab") as file:
        file.write(b'{"text": "more"}\n')
    with pytest.raises(DataError, match=r"the input .*a\.jsonl has changed; give the same again, or --restart"):
        run(inputs, folder, model)
    run(inputs, tmp_path / "whole", model)
    run(inputs, folder, model, restart=True)
    assert content(folder) == content(tmp_path / "whole")


def test_an_option_that_only_one_of_two_runs_has_is_a_difference(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [{"tasks": 3, "dedup.rows": 6}, {"tasks": 3, "dedup": None}]
    for old, new, words in ((*runs, "dedup.rows 6 instead of None"), (*runs[::-1], "dedup.rows None instead of 6")):
        workspace = resume.Workspace(str(tmp_path / "p"))
        workspace.begin(old, [], restart=True)
        workspace.save({"options": old, "inputs": []})
        with pytest.raises(DataError, match=f"begun with {words}"):
            workspace.begin(new, [], restart=False)
        assert workspace.begin(old, [], restart=False) is not None


def test_another_tokenizer_is_refused_and_skipping_bad_lines_is_not(
    tmp_path: Path, model: str, inputs: list[str]
) -> None:
    folder = tmp_path / "k"
    with pytest.raises(DataError, match=r"a\.jsonl, line 31: malformed JSON"):
        run(inputs, folder, model, on_bad_line="error")
    assert (folder / "p.partial" / "state.json").exists()
    other = str(tmp_path / "other.model")
    train_sentencepiece(TEXTS, other, 290)
    with pytest.raises(DataError, match="begun with tokenizer "):
        run(inputs, folder, other)
    run(inputs, folder, model)
    run(inputs, tmp_path / "whole", model)
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 0}'])
def test_a_damaged_state_is_refused(tmp_path: Path, model: str, inputs: list[str], damage: str) -> None:
    interrupt(inputs, tmp_path / "k", model)
    (tmp_path / "k" / "p.partial" / "state.json").write_text(damage)
    with pytest.raises(DataError, match=r"state\.json: is damaged or of another version; give --restart"):
        run(inputs, tmp_path / "k", model)


def test_a_lost_part_is_refused(tmp_path: Path, model: str, inputs: list[str]) -> None:
    interrupt(inputs, tmp_path / "k", model, 25)
    os.truncate(tmp_path / "k" / "p.partial" / "text.bin", 10)
    with pytest.raises(DataError, match=r"text\.bin: has 10 bytes where \d+ were written"):
        run(inputs, tmp_path / "k", model)


def test_a_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(
    tmp_path: Path, model: str, inputs: list[str]
) -> None:
    folder = tmp_path / "k"
    folder.mkdir()
    with (
        only_writer([str(folder / "p_valid_text_document")]),
        pytest.raises(DataError, match=rf"p_valid_text_document: is being written by process {os.getpid()}"),
    ):
        run(inputs, folder, model)
    assert os.listdir(folder) == []
    (folder / "p.partial").mkdir()  # of a run that has no checkpoint yet, over other keys
    with only_writer([str(folder / "p")]), pytest.raises(DataError, match=r"/p: is being written by process"):
        run(inputs, folder, model)
    assert (folder / "p.partial").is_dir()
    interrupt(inputs, folder, model)
    assert (folder / "p_text_document.lock").exists()
    run(inputs, folder, model)
    assert not list(folder.glob("*.lock"))


def test_a_lock_file_that_was_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, removed = resume.fcntl.flock, []

    def flock(file: Any, kind: int) -> None:
        original(file, kind)
        if not removed:
            removed.append(1)
            os.unlink(tmp_path / "p.lock")

    monkeypatch.setattr(resume.fcntl, "flock", flock)
    with only_writer([str(tmp_path / "p")]):
        monkeypatch.undo()
        with pytest.raises(DataError), only_writer([str(tmp_path / "p")]):
            pass


@pytest.mark.parametrize("limit", [0, 100, 2000, 3000])
def test_a_full_disk_is_one_line_and_can_be_gone_on_with(
    tmp_path: Path, model: str, inputs: list[str], limit: int
) -> None:
    run(inputs, tmp_path / "whole", model)
    reader, writer = os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run(inputs, tmp_path / "k", model)
        except DataError as error:
            os.write(writer, str(error).encode())

    assert in_child(work) == 0
    os.close(writer)
    with open(reader) as file:
        assert "cannot be written: File too large" in file.read()
    assert not list((tmp_path / "k").glob("*.bin")) and not list((tmp_path / "k").glob("*.idx"))
    run(inputs, tmp_path / "k", model)
    assert content(tmp_path / "k") == content(tmp_path / "whole")


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []
