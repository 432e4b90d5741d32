"""What is found before any process group exists, and what guards a run's directory."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import run_ranks
from tiny_runs import VOCAB, tiny_config, tiny_prepared, tiny_run

from megapoly.errors import CheckpointError, ConfigError, Echo
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config
from megapoly.train import setup
from megapoly.train.loop import train
from megapoly.train.prepare import Prepared, _check_writable, prepare, with_start
from megapoly.train.setup import build_run, check_agreement, only_writer, written_folders


def train_it(mesh: Mesh, cfg: Config) -> None:
    train(tiny_run(mesh, cfg))


def starting_point(cfg: Config) -> Prepared:
    prepared = tiny_prepared(cfg)
    return with_start(prepared, {})


def test_changed_files_of_the_same_length_are_noticed(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 2, exit_interval=1)
    run_ranks(train_it, cfg)
    starting_point(cfg)
    path = tmp_path / "ko_text_document.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="source ko is another file now"):
        starting_point(cfg)


def test_files_that_are_gone_once_a_run_has_begun_keep_it_from_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizer = SimpleNamespace(path=str(tmp_path), eod=0)
    monkeypatch.setattr("megapoly.train.prepare.resolve_vocab_size", lambda _: (VOCAB, tokenizer))
    run = build_run(prepare(tiny_config(tmp_path, "gpt2", 2), 1, False), single_process_mesh())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "ko_text_document.idx").unlink()
    assert run.checkpoint_state(1)["data"].keys() == {"source en", "source ko", "tokenizer"}


def test_a_run_killed_before_its_first_latest_resumes(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 2, exit_interval=1)
    run_ranks(train_it, cfg)
    (tmp_path / "run/checkpoints/latest").unlink()
    assert starting_point(cfg).start_step == 1


def test_another_plan_is_refused_but_a_longer_one_goes_on(tmp_path: Path) -> None:
    run_ranks(train_it, tiny_config(tmp_path, "gpt2", 2, exit_interval=1))
    starting_point(tiny_config(tmp_path, "gpt2", 8))
    with pytest.raises(CheckpointError, match="another data plan"):
        starting_point(tiny_config(tmp_path, "gpt2", 2, seed=5))
    with pytest.raises(CheckpointError, match="samples came in batches of 8 .*, not of 4"):
        starting_point(tiny_config(tmp_path, "gpt2", 2, global_batch_size=4))


def test_one_job_writes_to_a_run(tmp_path: Path) -> None:
    with only_writer(str(tmp_path / "run"), is_main=True):
        with pytest.raises(ConfigError, match="another job is writing"), only_writer(str(tmp_path / "run"), True):
            pass
        with only_writer(str(tmp_path / "run"), is_main=False):
            pass
    with only_writer(str(tmp_path / "run"), is_main=True):
        pass


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(setup.fcntl, "flock", flock)
    with only_writer(str(tmp_path / "run"), is_main=True):
        assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'run'}: has no file locks (Function not")


def test_a_place_with_two_names_is_written_by_one_job(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run/checkpoints")
    cfg = tiny_config(tmp_path, "gpt2", 2, save_copy=str(tmp_path / "link"))
    assert written_folders(cfg) == [str(tmp_path / "run"), str(tmp_path / "run/checkpoints")]


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(ConfigError, match="no writable directory"):
            _check_writable(str(place))
    with pytest.raises(ConfigError, match="cannot be written"):
        _check_writable(str(tmp_path / ("a" * 300)))
    _check_writable(str(tmp_path / "new/deeper"))


def disagree(mesh: Mesh, folder: Path) -> str:
    seed = 1 if mesh.world.rank == 1 else 0
    try:
        check_agreement(tiny_prepared(tiny_config(folder, "gpt2", 2, seed=seed)), mesh)
    except (ConfigError, Echo) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_sees_another_configuration_is_named(tmp_path: Path) -> None:
    tiny_config(tmp_path, "gpt2", 2)  # the files, once
    said, *echoes = run_ranks(disagree, tmp_path, dp=3)
    assert said.startswith("ConfigError: rank 1 sees another configuration")
    assert [echo.split(":")[0] for echo in echoes] == ["Echo", "Echo"]  # all end, one speaks


def test_another_optimizers_state_is_refused(tmp_path: Path) -> None:
    run_ranks(train_it, tiny_config(tmp_path, "gpt2", 2, exit_interval=1))
    with pytest.raises(CheckpointError, match="holds the state of optimizer adam, not of muon"):
        starting_point(tiny_config(tmp_path, "gpt2", 2, optimizer="muon"))


def test_a_run_that_has_checkpoints_goes_on_where_what_it_began_with_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapoly.train.prepare.resolve_vocab_size", lambda _: (VOCAB, None))
    with pytest.raises(CheckpointError, match="/nonexistent: no checkpoint here"):
        prepare(tiny_config(tmp_path, "gpt2", 4, load="/nonexistent"), 1, False)
    run_ranks(train_it, tiny_config(tmp_path, "gpt2", 4))
    assert prepare(tiny_config(tmp_path, "gpt2", 4, load="/nonexistent"), 1, False).is_resume


def test_another_sequence_length_is_no_change_of_sources_that_are_not_packed(tmp_path: Path) -> None:
    run_ranks(train_it, tiny_config(tmp_path, "gpt2", 4))
    with pytest.raises(CheckpointError, match="block_length was 16 and is 8") as refused:
        starting_point(tiny_config(tmp_path, "gpt2", 4, seq_length=8))
    assert "packed" not in str(refused.value)
