"""The example on 18 languages: its plans are those that it tells of, and its checks see what they are there to see."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megapoly.config import load_config
from megapoly.data.curriculum import make_plan
from megapoly.data.indexed import IndexedDatasetWriter
from megapoly.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("curriculum_run", ROOT / "examples/curriculum_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, example: ModuleType) -> Path:
    """So few tokens a language that English comes more than once."""
    folder = tmp_path_factory.mktemp("eighteen")
    for source in load_config(str(example.CONFIG)).data.sources:
        with IndexedDatasetWriter(str(folder / f"{source.name}_text_document"), 100) as writer:
            writer.add_document(np.arange(2000 * 64 + 1) % 100)
            writer.finalize()
    return folder


def test_the_plan_goes_from_30_to_60_per_cent_and_stays_there(example: ModuleType, data: Path) -> None:
    example.write_appended(data / "longer.yaml", data)
    cfg, longer = load_config(str(example.CONFIG)), load_config(str(data / "longer.yaml"))
    plan, more = (make_plan(c, [2000 * 64 + 1] * 18) for c in (cfg, longer))
    assert cfg.data.sources == load_config("polylm-1.7b", {"data_root": cfg.data.data_root}).data.sources
    assert [stage.name for stage in more.stages] == ["stage1", "rising", "raised"]
    assert more.fingerprint(plan.num_samples) == plan.fingerprint()
    shares = [more.non_english_share(stage.steps[end].shares) for stage in more.stages for end in (0, -1)]
    assert shares == pytest.approx([0.3, 0.3, 0.3, 0.6, 0.6, 0.6], abs=0.01)
    assert longer.curriculum.stages[:2] == cfg.curriculum.stages and longer.schedule == cfg.schedule
    begin, end = more.stages[1].begin_sample, more.stages[1].end_sample
    saved, killed = (32 * step for step in (example.SAVED_AT, example.KILLED_AFTER))
    assert begin < saved < killed < end and example.SAVED_AT % cfg.train.save_interval == 0


def damaged(lines: list[str], how: str) -> list[str]:
    """A listing in which an English sample is another one: the one before again, or one of much later."""
    rows = [json.loads(line) for line in lines]
    english = [i for i, row in enumerate(rows) if row["source"] == "en"]
    if how == "repeated":
        rows[english[5]] |= {key: rows[english[4]][key] for key in ("epoch", "offset")}
    elif how == "skipped":
        rows[english[5]] |= {"epoch": 7}
    return [json.dumps(row) for row in rows]


@pytest.mark.parametrize(
    ("how", "said"), [("", "0 repeated, 0 left out"), ("repeated", "1 repeated, 1 left out"), ("skipped", "0 repeated, 1 left out")]
)  # fmt: skip
def test_repeats_and_gaps_are_counted(
    how: str, said: str, example: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    example.write_appended(data / "longer.yaml", data)
    real = example.tool

    def tool(*words: Any, **options: Any) -> str:
        lines = real(*words, **options).splitlines()
        return "\n".join(damaged(lines, how) if words[-1] == ":" else lines)

    monkeypatch.setattr(example, "tool", tool)
    example.check_order(example.CONFIG, data / "longer.yaml", ("--data-root", data))
    assert f"order: 6,250 samples of the first plan, then 1,563 of the longer one, 18 sources: {said}\n" in (
        capsys.readouterr().out
    )


def test_runs_are_compared_step_by_step(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = [{"step": n, "loss": 4.0, "tokens_by_source": {"en": 64}, "seconds": n} for n in range(1, 7)]
    rows = [straight[n] | {"seconds": 9.0} for n in range(2, 6)]
    rows[1] |= {"loss": 4.4}
    rows[2] |= {"tokens_by_source": {"zh": 64}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [{key: value for key, value in row.items() if key != "seconds"} for row in straight]
    example.compare("other", tmp_path, own)
    assert capsys.readouterr().out == (
        "other: steps 3 to 6; tokens by source equal in 3, every number to the last bit in 2; "
        "losses at most 1.0e-01 apart\n"
    )


def test_a_folder_that_lacks_a_language_is_refused(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "en.jsonl.gz").touch()
    with pytest.raises(DataError, match="has no zh.jsonl.gz, es.jsonl.gz, .*; each language of"):
        example.prepare(tmp_path, tmp_path)
