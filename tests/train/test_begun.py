"""A run that has saved is not begun anew where its checkpoints are not found; one that has saved nothing is."""

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import run_to_end, tiny_config, tiny_prepared

from megapoly.errors import ConfigError
from megapoly.parallel.mesh import single_process_mesh
from megapoly.train.begun import check_not_lost
from megapoly.train.prepare import with_start
from megapoly.train.rows import rows_of


def test_a_run_that_has_saved_is_not_begun_anew_over_its_rows(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 4, save_interval=2, save=str(tmp_path / "saved"))
    forgotten = dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, save=str(tmp_path / "other")))
    rows = tmp_path / "run/metrics.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"step": 1}\n')
    check_not_lost(with_start(tiny_prepared(cfg), {}))  # killed before its first save
    run_to_end(single_process_mesh(), cfg)
    assert (tmp_path / "run/saved_to").read_text() == f"{tmp_path}/saved\n"
    check_not_lost(with_start(tiny_prepared(cfg), {}))
    with pytest.raises(
        ConfigError, match=f"rows up to step 4, and .*'{tmp_path}/saved', but none is in .*/other: give"
    ):
        check_not_lost(with_start(tiny_prepared(forgotten), {}))
    (tmp_path / "saved").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="mount what is missing"):
        check_not_lost(with_start(tiny_prepared(cfg), {}))
    rows.unlink()
    check_not_lost(with_start(tiny_prepared(cfg), {}))


def test_a_run_begun_anew_has_saved_nothing_until_it_saves(tmp_path: Path) -> None:
    """What an earlier run of the directory saved does not stop the restarts of this one before its first save."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/saved_to").write_text("/before\n")
    cfg = tiny_config(tmp_path, "gpt2", 4, save_interval=0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("megapoly.train.loop.Saver.finish", lambda *_: (_ for _ in ()).throw(InterruptedError()))
        patch.setattr("megapoly.train.loop.Saver.save", lambda *_: None)
        run_to_end(single_process_mesh(), cfg)
    assert [row["step"] for row in rows_of(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
    check_not_lost(with_start(tiny_prepared(cfg), {}))
