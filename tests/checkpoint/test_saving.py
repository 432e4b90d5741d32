"""A save goes on beside the training, one at a time; what fails is retried, and never costs what is already there."""

import errno
import io
import os
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_runs import run_to_end, tiny_config, tiny_run, whole_state

from megapoly.checkpoint import save as module
from megapoly.checkpoint.load import CheckpointReader, find_checkpoint
from megapoly.checkpoint.report import verify
from megapoly.checkpoint.save import Saver
from megapoly.checkpoint.shard import BLOCK, reading, write_shard
from megapoly.checkpoint.state import Piece
from megapoly.checkpoint.storage import Chunk, TensorRecord
from megapoly.checks import check
from megapoly.errors import CheckpointError, ConfigError, Echo, StuckError
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config
from megapoly.train.loop import make_saver
from megapoly.train.setup import Run
from megapoly.train.step import train_step

TWO = {"tensor_model_parallel_size": 2}


def a_run(mesh: Mesh, cfg: Config) -> tuple[Run, Saver]:
    """A run that has made a step, and its saver."""
    run = tiny_run(mesh, cfg)
    saver = make_saver(run)
    train_step(run, 1)
    return run, saver


class Gate:
    """Holds the writers until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.threads: set[str] = set()

        def write(*args: Any) -> dict[str, Any]:
            self.threads.add(threading.current_thread().name)
            assert self.opened.wait(60)
            return write_shard(*args)

        patch.setattr(module, "write_shard", write)


def save_and_go_on(mesh: Mesh, cfg: Config) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        run, saver = a_run(mesh, cfg)
        state = {name: tensor.clone() for name, tensor in whole_state(run).items()}
        saver.save(1, run.checkpoint_state(1))
        train_step(run, 2)  # while the writers wait: what they write must not be what this changes
        train_step(run, 3)
        assert not saver.roots[0].joinpath("latest").exists() and saver.news() == []
        gate.opened.set()
        saver.wait()
        assert gate.threads == {"checkpoint"}
        assert mesh.world.rank != 0 or any("saved" in line for line in saver.news())
        assert any((state[name] != now).any() for name, now in whole_state(run).items())
    return state


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"dp": 2}])
def test_steps_go_on_while_the_state_that_was_is_written(layout: dict[str, int], tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 4, tensor_model_parallel_size=layout.get("tp", 1))
    expected = run_ranks(save_and_go_on, cfg, **layout)[0]
    reader = CheckpointReader.open(tmp_path / "run")
    assert reader.records.keys() == expected.keys() and verify(reader.folder) == []
    for name, tensor in expected.items():
        found = torch.full_like(tensor, torch.nan)
        reader.read([module.Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), found)])
        assert torch.equal(found, tensor), name


def test_any_reader_of_safetensors_reads_a_shard(tmp_path: Path) -> None:
    run_to_end(single_process_mesh(), tiny_config(tmp_path, "gpt2", 2))
    reader = CheckpointReader.open(tmp_path / "run")
    with safetensors.safe_open(str(reader.folder / "shard_00000.safetensors"), framework="pt") as shard:
        assert len(shard.keys()) == len(reader.records)
        name = "embedding.word.weight"
        assert torch.equal(shard.get_tensor(f"model.{name}@0,0"), reader.get(name))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_checksums_are_those_of_zlib_whatever_computes_them(size: int, tmp_path: Path) -> None:
    """A host may have zlib-ng or not, and read what another one wrote."""
    content = torch.randint(0, 256, (size // 2,), generator=torch.Generator().manual_seed(1)).half()
    entry = write_shard(tmp_path / "shard_00000.safetensors", [Piece("x", (size // 2,), (0,), content)])
    name, _, _, (offsets, sizes, file, begin, crc) = entry["chunks"][0]
    written = (tmp_path / file).read_bytes()
    assert (begin, crc) == (entry["files"][file][2], zlib.crc32(written[begin:]))
    assert entry["files"][file][1] == zlib.crc32(written[:begin])
    into = torch.empty_like(content)
    with reading(tmp_path) as shards:
        record = TensorRecord(torch.float16, (size // 2,), (chunk := Chunk(offsets, sizes, file, begin, crc),))
        assert shards.read(name, record, chunk, into) is into and torch.equal(into, content)


def sizes(mesh: Mesh, cfg: Config) -> tuple[int, int]:
    run, saver = a_run(mesh, cfg)
    saver.save(1, run.checkpoint_state(1))
    saver.finish(1, run.checkpoint_state(1))
    memory = 0 if saver.copy is None else saver.copy.memory.nbytes
    return sum(tensor.nbytes for tensor in whole_state(run).values()), memory


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"bf16": True, "optimizer": "muon"}])
def test_every_byte_of_the_state_is_written_once(options: dict[str, Any], is_async: bool, tmp_path: Path) -> None:
    """Replicas, instances and bf16 copies of the master weights are not; nor is more memory taken than a rank writes."""
    layout = {"tp": 2, "dp": 4, "instances": 2}
    cfg = tiny_config(
        tmp_path, "gpt2", 4, async_save=is_async, num_distributed_optimizer_instances=2, **TWO, **options
    )  # fmt: skip
    found = run_ranks(sizes, cfg, **layout)
    reader = CheckpointReader.open(tmp_path / "run")
    written = sum(record.num_bytes(chunk) for record in reader.records.values() for chunk in record.chunks)
    assert written == found[0][0]
    shards = sum(path.stat().st_size for path in reader.folder.glob("shard_*"))
    headers = sum(record.begin for name, record in reader.contents.files.items() if name.startswith("shard"))
    assert shards == written + headers
    assert sum(memory for _, memory in found) == (written if is_async else 0)
    assert len(list(reader.folder.glob("shard_*"))) == 4  # of the first instance


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, saver = a_run(single_process_mesh(), tiny_config(tmp_path, "gpt2", 4))
    gate = Gate(monkeypatch)
    saver.save(1, run.checkpoint_state(1))
    first = saver.copy.memory.clone()
    train_step(run, 2)
    threading.Timer(0.3, gate.opened.set).start()
    saver.save(2, run.checkpoint_state(2))
    assert find_checkpoint(tmp_path / "run").name >= "step_00000001"
    assert not torch.equal(saver.copy.memory, first)
    saver.finish(2, run.checkpoint_state(2))
    assert [verify(saver.roots[0] / f"step_0000000{n}") for n in (1, 2)] == [[], []]


def full_disk(patch: pytest.MonkeyPatch, is_full: Callable[[Path], bool]) -> None:
    """From now on writing a shard fails, after half of it, where is_full(path) says so."""

    def write(path: Path, pieces: list[Any]) -> dict[str, Any]:
        if is_full(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_shard(path, pieces)

    patch.setattr(module, "write_shard", write)


def saves_of_a_full_disk(mesh: Mesh, cfg: Config) -> list[str]:
    """Five saves of which those of steps 2, 4 and 5 fail on one rank, 2 on another as well."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        bad = {2: (0, 3), 4: (3,), 5: (1,)}
        full_disk(patch, lambda path: mesh.world.rank in bad.get(int(path.parent.name[6:14]), ()))
        run, saver = a_run(mesh, cfg)
        for step in range(1, 6):
            try:
                saver.save(step, run.checkpoint_state(step))
                saver.wait()
                told.append(f"{step} {saver.failures}")
            except (CheckpointError, Echo) as error:
                told.append(f"{type(error).__name__}: {error}")
    return told


@pytest.mark.parametrize("is_async", [True, False])
def test_a_full_disk_costs_its_save_and_ends_the_run_when_it_stays_full(
    is_async: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 6, max_failed_saves=2, async_save=is_async, **TWO)
    told = run_ranks(saves_of_a_full_disk, cfg, tp=2, dp=2)
    assert all(rank[:-1] == ["1 0", "2 1", "3 0", "4 1"] for rank in told)
    assert told[1][-1].startswith("CheckpointError: 2 saves in a row failed, the last one with: /")
    assert "shard_00001.safetensors: No space left on device; earlier checkpoints are whole" in told[1][-1]
    assert all(told[rank][-1] == "Echo: rank 1 could not save" for rank in (0, 2, 3))
    root = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000001", "step_00000003"]
    assert find_checkpoint(root).name == "step_00000003" and verify(find_checkpoint(root)) == []
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len([line for line in lines if "is not saved" in line and "No space left" in line]) == len(lines) == 4
    assert {line.split()[2] for line in lines if "step_00000002" in line} == {"0:", "3:"}


def test_the_last_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([True, True, False])
    full_disk(monkeypatch, lambda _: next(times))
    run_to_end(single_process_mesh(), tiny_config(tmp_path, "gpt2", 2))
    assert find_checkpoint(tmp_path / "run").name == "step_00000002"
    assert [path.name for path in (tmp_path / "run/checkpoints").glob(".*")] == []


def test_a_run_whose_last_save_fails_for_good_ends_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_to_end(single_process_mesh(), tiny_config(tmp_path, "gpt2", 4, run_dir=str(tmp_path / "straight")))
    cfg = tiny_config(tmp_path, "gpt2", 4, save_steps=[1])
    with monkeypatch.context() as patch:
        full_disk(patch, lambda path: "step_00000004" in str(path))
        with pytest.raises(CheckpointError, match="3 saves in a row failed"):
            run_to_end(single_process_mesh(), cfg)
    assert find_checkpoint(tmp_path / "run").name == "step_00000001"
    found = run_to_end(single_process_mesh(), cfg)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_one_directory_that_is_full_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    full_disk(monkeypatch, lambda path: "checkpoints" in str(path))
    cfg = tiny_config(tmp_path, "gpt2", 2, save_copy=str(tmp_path / "copy"), max_failed_saves=1)
    run_to_end(single_process_mesh(), cfg)
    assert find_checkpoint(tmp_path / "copy").name == "step_00000002"
    assert not (tmp_path / "run/checkpoints/latest").exists()
    assert "warning: rank 0:" in capfd.readouterr().err


def test_a_full_disk_under_the_log_as_well_costs_the_other_directory_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, lambda path: "checkpoints" in str(path))
    cfg = tiny_config(tmp_path, "gpt2", 2, save_copy=str(tmp_path / "copy"), max_save_minutes=0.05)
    with Path("/dev/full").open("wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", io.TextIOWrapper(full, write_through=True))
        run_to_end(single_process_mesh(), cfg)
    assert verify(find_checkpoint(tmp_path / "copy")) == []


def test_a_run_that_never_saved_is_not_told_of_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, lambda _: True)
    with pytest.raises(CheckpointError, match="No space left on device; there is no earlier checkpoint: mend it"):
        run_to_end(single_process_mesh(), tiny_config(tmp_path, "gpt2", 2, num_layers=1))


def test_a_directory_that_was_removed_is_made_again_but_not_those_above(tmp_path: Path) -> None:
    run, saver = a_run(single_process_mesh(), tiny_config(tmp_path, "gpt2", 3, save=str(tmp_path / "a/b")))
    for step, gone in ((1, "a/b"), (2, "a")):
        shutil.rmtree(tmp_path / gone)
        saver.save(step, run.checkpoint_state(step))
        saver.wait()
    assert saver.failures == 1 and not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    saver.save(3, run.checkpoint_state(3))
    saver.wait()
    assert verify(tmp_path / "a/b/step_00000003") == []


def test_a_fault_of_ours_in_the_writer_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(module, "write_shard", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_to_end(single_process_mesh(), tiny_config(tmp_path, "gpt2", 2))


def shards_that_stay_unseen(mesh: Mesh, cfg: Config) -> str:
    """Each rank has a directory of its own, as where hosts do not share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "VISIBLE_SECONDS", 0.3)
        run, saver = a_run(mesh, cfg)
        saver.roots = [saver.roots[0] / str(mesh.world.rank)]
        saver.roots[0].mkdir()
        saver.save(1, run.checkpoint_state(1))
        try:
            saver.wait()
        except (CheckpointError, Echo) as error:
            return str(error)
    return ""


def test_directories_that_hosts_do_not_share_are_noticed(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 2, max_failed_saves=1, **TWO)
    told = run_ranks(shards_that_stay_unseen, cfg, tp=2)
    assert "shard_00001.json is not seen" in told[0] and "all hosts need the same directory" in told[0]
    assert told[1] == "rank 0 could not save"


def a_writer_that_does_not_come_back(mesh: Mesh, cfg: Config, late: int) -> list[str]:
    """A rank that stands in a write (the main one: when all shards are there); what the others meet, and the status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REMINDER_SECONDS", 0.2)
        gate = Gate(patch)
        patch.setattr(module, "publish", lambda *_: gate.opened.wait(60))
        if mesh.world.rank != late or late == 0:
            gate.opened.set()
        if mesh.world.rank == late == 0:
            patch.setattr(module, "publish", lambda *_: time.sleep(60))
        run, saver = a_run(mesh, cfg)
        begin = time.monotonic()
        try:
            with saver:
                saver.save(1, run.checkpoint_state(1))
                train_step(run, 2)
                saver.save(2, run.checkpoint_state(2))
        except (StuckError, Echo) as error:
            assert time.monotonic() - begin < 10  # and does not wait for the disk again
            return [type(error).__name__, str(error), str(error.status)]
    return []


@pytest.mark.parametrize("late", [0, 1])
def test_a_save_that_never_ends_is_told_of_and_ends_the_run(
    late: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 2, max_save_minutes=0.02, **TWO)
    told = run_ranks(a_writer_that_does_not_come_back, cfg, late, tp=2)
    assert told[1 - late] == ["Echo", f"rank {late} cannot write", "1"]
    kind, line, status = told[late]
    assert (kind, status) == ("StuckError", "1")
    folder = str(tmp_path / "run/checkpoints/.step_00000001.")
    assert line.startswith(f"rank {late}: {folder}") and "s now and does not end (max_save_minutes 0.02)" in line
    lines = [text for text in capfd.readouterr().err.splitlines() if text.startswith("warning: ")]
    assert len(lines) >= 3 and all(text.startswith(f"warning: rank {late}: {folder}") for text in lines)
    assert all(text.endswith("and the run waits for it") for text in lines)


def test_a_slow_save_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any) -> dict[str, Any]:
        time.sleep(1)
        return write_shard(*args)

    monkeypatch.setattr(module, "write_shard", slow)
    for minutes in (0.0, 1.0):
        name = str(tmp_path / str(minutes))
        run_to_end(single_process_mesh(), tiny_config(tmp_path, "gpt2", 2, max_save_minutes=minutes, run_dir=name))
        assert find_checkpoint(name).name == "step_00000002"


def dies_while_saving(mesh: Mesh, cfg: Config) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        if mesh.world.rank != 1:
            gate.opened.set()
        run, saver = a_run(mesh, cfg)
        saver.save(2, run.checkpoint_state(2))
        while not any(saver.roots[0].glob(".step_*/shard_00000.json")):
            time.sleep(0.01)
        dist.barrier()
        if mesh.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    return True


def test_a_rank_that_dies_while_it_saves_leaves_only_a_temporary_folder(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 4, exit_interval=1, **TWO)
    run_ranks(run_to_end, cfg, tp=2)
    root = tmp_path / "run/checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ranks.RESULT_SECONDS", 8)
        with pytest.raises(Exception, match=r"^$"):  # queue.Empty: a killed rank says nothing
            run_ranks(dies_while_saving, cfg, tp=2)
    left = sorted(path.name for path in root.iterdir())
    assert left[0].startswith(".step_00000002.") and left[1:] == ["latest", "step_00000001"]
    assert find_checkpoint(root).name == "step_00000001"
    run_ranks(run_to_end, tiny_config(tmp_path, "gpt2", 4, **TWO), tp=2)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000001", "step_00000004"]


def fails_after_a_save(mesh: Mesh, cfg: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        run, saver = a_run(mesh, cfg)
        threading.Timer(0.3, gate.opened.set).start()
        with pytest.raises(ArithmeticError), saver:
            saver.save(1, run.checkpoint_state(1))
            raise ArithmeticError


def test_an_error_waits_for_the_save_under_way(tmp_path: Path) -> None:
    run_ranks(fails_after_a_save, tiny_config(tmp_path, "gpt2", 4, **TWO), tp=2)
    assert verify(find_checkpoint(tmp_path / "run")) == []
    assert find_checkpoint(tmp_path / "run").name == "step_00000001"


def test_old_checkpoints_go_as_the_policy_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def policy(steps: int, exit_interval: int | None = None) -> Config:
        return tiny_config(
            tmp_path, "gpt2", 10, save_interval=1, most_recent_k=2, save_retain_interval=4, save_steps=[3],
            train_iters=steps, exit_interval=exit_interval, save_copy=str(tmp_path / "copy"),
        )  # fmt: skip

    run_to_end(single_process_mesh(), policy(7))
    for root in (tmp_path / "run/checkpoints", tmp_path / "copy"):
        assert sorted(path.name for path in root.glob("step_*")) == [f"step_0000000{n}" for n in (3, 4, 6, 7)]
    assert "deleted" in capfd.readouterr().out
    # The run goes on from 7, whose bytes were read and found sound: it stays while the new ones were only written.
    run_to_end(single_process_mesh(), policy(10))
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert kept == [3, 4, 7, 8, 9, 10]


def test_training_draws_from_no_generator(tmp_path: Path) -> None:
    """Resumes need no state of one: whatever the generators hold, steps are the same and leave them as they were."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run = tiny_run(single_process_mesh(), tiny_config(tmp_path, "gpt2", 4, hidden_dropout=0.1))
        for step in (1, 2):
            train_step(run, step)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(whole_state(run))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"most_recent_k": 0}, "most_recent_k \\(0\\) must be positive"),
        ({"save_retain_interval": -5}, "save_retain_interval \\(-5\\) must be positive"),
        (
            {"save_retain_interval": 7, "save_interval": 2},
            "must be a multiple of save_interval \\(2\\), such as 6 or 8",
        ),
        ({"save_steps": [1, 0]}, "save_steps \\(0\\) must be positive"),
        ({"max_save_minutes": -1.0}, "max_save_minutes \\(-1.0\\) must"),
        ({"max_failed_saves": 0}, "max_failed_saves \\(0\\) must be positive"),
        ({"save": "a/b", "save_copy": "a/../a/b"}, "save_copy \\(a/../a/b\\) is the directory of save"),
    ],
)
def test_policies_that_cannot_be_meant_are_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    check(tiny_config(tmp_path, "gpt2", 4, save_interval=2, save_retain_interval=6, most_recent_k=1), 1)
    with pytest.raises(ConfigError, match=reason):
        check(tiny_config(tmp_path, "gpt2", 4, **options), 1)
