"""Which checkpoints stay, and how they come and go: a kill at any moment leaves whole ones, and `latest` names one."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.checkpoint import folders
from megapoly.checkpoint.folders import (
    Retention,
    find_folders,
    go_back,
    prune,
    publish,
    read_latest,
    step_folders,
    sweep,
)
from megapoly.errors import CheckpointError

FILES = ("metadata.json", "shard_00000.safetensors", "state.json")


def make(root: Path, step: int, content: str = "x") -> Path:
    """A checkpoint that is ready to be published."""
    temporary = root / f".step_{step:08d}.abc0001.tmp"
    temporary.mkdir(parents=True)
    for name in FILES:
        (temporary / name).write_text(content)
    return temporary


def present(root: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in step_folders(root)][::-1]


def with_steps(root: Path, steps: range | list[int]) -> Path:
    for step in steps:
        publish(make(root, step), "abc")
    return root


@given(
    st.sets(st.integers(1, 60), min_size=1),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 9),
    st.frozensets(st.integers(1, 60)),
)
def test_what_is_outdated(steps: set[int], last: int | None, every: int | None, always: frozenset[int]) -> None:
    gone = set(Retention(last, every, always).outdated(list(steps)))
    kept = steps - gone
    assert gone <= steps and max(steps) in kept
    assert all(step in kept for step in steps if step in always or (every and step % every == 0))
    assert len([s for s in kept if s not in always and not (every and s % every == 0)]) <= (last or len(steps))
    if last is None and every is None:
        assert not gone
    if last is not None:
        assert set(sorted(steps)[-last:]) <= kept
    assert not gone or min(gone) >= min(steps - always - {s for s in steps if every and s % every == 0})


def test_as_megatron_a_retain_interval_alone_keeps_the_last_and_its_multiples(tmp_path: Path) -> None:
    with_steps(tmp_path, range(1, 8))
    prune(tmp_path, Retention(every=3), None, "abc")
    assert present(tmp_path) == [3, 6, 7]


def test_as_megatron_the_newest_are_counted_of_all(tmp_path: Path) -> None:
    with_steps(tmp_path, range(1, 6))
    prune(tmp_path, Retention(last=2, every=2), None, "abc")
    assert present(tmp_path) == [2, 4, 5]


def test_neither_latest_nor_what_a_run_began_with_goes(tmp_path: Path) -> None:
    with_steps(tmp_path, range(1, 7))
    assert len(prune(tmp_path, Retention(last=1), tmp_path / "step_00000002", "abc")) == 4
    assert present(tmp_path) == [2, 6]


def test_going_back_deletes_what_came_after(tmp_path: Path) -> None:
    with_steps(tmp_path, [2, 4, 6])
    assert [folder.name for folder in go_back(tmp_path, 4, "abc")] == ["step_00000006"]
    assert present(tmp_path) == [2, 4] and read_latest(tmp_path) == tmp_path / "step_00000004"
    go_back(tmp_path, 3, "abc")  # of a step that this directory does not have: the newest before it
    assert present(tmp_path) == [2] and read_latest(tmp_path) == tmp_path / "step_00000002"
    go_back(tmp_path, 1, "abc")
    assert not list(tmp_path.iterdir()) and find_folders(tmp_path) == []
    go_back(tmp_path, 1, "abc")


def test_the_future_that_was_given_up_is_not_counted_nor_deleted(tmp_path: Path) -> None:
    """`latest` set back by hand to 3: the checkpoints 4 to 6 neither push out 2 and 3 nor go themselves."""
    with_steps(tmp_path, range(1, 7))
    (tmp_path / "latest").write_text("step_00000003\n")
    assert [folder.name for folder in find_folders(tmp_path)] == [f"step_0000000{n}" for n in (3, 2, 1)]
    prune(tmp_path, Retention(last=2), None, "abc")
    assert present(tmp_path) == [2, 3, 4, 5, 6]


def test_nothing_else_is_swept_than_what_saves_leave(tmp_path: Path) -> None:
    with_steps(tmp_path, [1])
    make(tmp_path, 2)
    (tmp_path / ".step_00000003.0123456789abcdef.old").mkdir()
    (tmp_path / ".step_00000002.abc.latest").write_text("step_")  # whose folder has not got its name
    for name in ("notes.txt", "step_x", ".step_2.tmp", ".step_00000003.tmp", "step_00000004.abc.tmp"):
        (tmp_path / name).mkdir()
    before = set(os.listdir(tmp_path))
    sweep(tmp_path)
    gone = {".step_00000002.abc0001.tmp", ".step_00000003.0123456789abcdef.old", ".step_00000002.abc.latest"}
    assert before - set(os.listdir(tmp_path)) == gone


class Killed(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, moment: int, act: Callable[[], object]) -> bool:
    """Run until just before the nth change that is made to a disk; whether there were as many."""
    left = moment
    with monkeypatch.context() as patch:

        def dies_before(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*args, **kwargs)

            return call

        for target, name in (
            (os, "rename"),
            (os, "replace"),
            (os, "unlink"),
            (os, "rmdir"),
            (os, "fsync"),
            (os, "mkdir"),
        ):
            patch.setattr(target, name, dies_before(getattr(target, name)))
        try:
            act()
        except Killed:
            return True
        return False


def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_a_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing step 3 over an abandoned one, then pruning, stopped before every single operation."""
    moments = 0
    while True:
        root = with_steps(tmp_path / str(moments), [1, 2, 3])
        (root / "latest").write_text("step_00000002\n")
        temporary = make(root, 3, "new")

        def act(root: Path = root, temporary: Path = temporary) -> None:
            publish(temporary, "abc")
            prune(root, Retention(last=1), None, "abc")

        was_killed = killed_at(monkeypatch, moments, act)
        found = find_folders(root)
        assert found and all(sorted(os.listdir(folder)) == sorted(FILES) for folder in found if folder.exists())
        is_there = any(path.read_text() == "new" for path in root.glob("step_00000003/state.json"))
        assert found[0].name == ("step_00000003" if is_there else "step_00000002") and found[0].exists()
        sweep(root)
        assert find_folders(root)[0] == found[0] and (root / "latest").read_text() == f"{found[0].name}\n"
        assert not [name for name in os.listdir(root) if name.startswith(".")]
        assert all(sorted(os.listdir(folder)) == sorted(FILES) for folder in step_folders(root))
        if not was_killed:
            assert present(root) == [3]
            break
        moments += 1
    assert moments > 12


def test_the_order_in_which_things_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder and what becomes `latest` are synced before the folder gets its name, its name before `latest` is it."""
    temporary = make(tmp_path, 5)
    log: list[str] = []
    real_sync, real_fsync = folders.sync_directory, os.fsync
    monkeypatch.setattr(folders, "sync_directory", lambda path: (log.append(f"sync {path.name}"), real_sync(path)))
    monkeypatch.setattr(
        os, "fsync", lambda fd: (log.append(Path(f"/proc/self/fd/{fd}").resolve().name), real_fsync(fd))
    )
    real_rename, real_replace = Path.rename, Path.replace
    monkeypatch.setattr(Path, "rename", lambda p, q: (log.append(f"{p.name} -> {q.name}"), real_rename(p, q))[1])
    monkeypatch.setattr(Path, "replace", lambda p, q: (log.append(f"{p.name} -> {q.name}"), real_replace(p, q))[1])
    publish(temporary, "abc")
    root = tmp_path.name
    assert [line for line in log if " " in line or line.endswith("latest")] == [
        f"sync {temporary.name}", ".step_00000005.abc.latest", f"{temporary.name} -> step_00000005", f"sync {root}",
        ".step_00000005.abc.latest -> latest", f"sync {root}",
    ]  # fmt: skip
    assert read_latest(tmp_path) == tmp_path / "step_00000005"


def test_a_checkpoint_that_latest_was_about_to_name_is_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not once a hand has set `latest` back; and one whose folder is not there is nobody's."""
    with_steps(tmp_path, [4])
    temporary = make(tmp_path, 8)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        publish(temporary, "abc")
    monkeypatch.undo()
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    assert [folder.name for folder in find_folders(tmp_path)] == ["step_00000008", "step_00000004"]
    (tmp_path / ".step_00000012.abc.latest").write_text("step_00000012\n")
    assert find_folders(tmp_path)[0].name == "step_00000008"
    (tmp_path / "latest").write_text("step_00000004\n")
    assert find_folders(tmp_path)[0].name == "step_00000004"
    sweep(tmp_path)
    assert find_folders(tmp_path)[0].name == "step_00000004" and present(tmp_path) == [4, 8]


def test_going_back_that_has_not_come_to_latest_has_not_happened(tmp_path: Path) -> None:
    with_steps(tmp_path, [4, 8])
    (tmp_path / ".step_00000004.abc.latest").write_text("step_00000004\n")
    assert find_folders(tmp_path)[0].name == "step_00000008"
    sweep(tmp_path)
    assert (tmp_path / "latest").read_text() == "step_00000008\n" and present(tmp_path) == [4, 8]


def test_latest_that_names_no_step_is_refused(tmp_path: Path) -> None:
    with_steps(tmp_path, [1])
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"latest: '\.\./elsewhere' is no step folder's name"):
        find_folders(tmp_path)
