"""Training on packed rows: each document as if read alone, on any layout, whatever is padding."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from test_parity import assert_same_training, steps_of
from tiny_runs import VOCAB, run_to_end, tiny_config, tiny_prepared, tiny_run

from megapoly.data.indexed import CODES, token_dtype
from megapoly.data.packed import PackNote, write_note
from megapoly.data.packing import pack_documents
from megapoly.errors import CheckpointError
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.metrics import Metrics, progress_line
from megapoly.train.prepare import with_start
from megapoly.train.step import train_step

LENGTH = 16
STEPS = 6
APART = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}


def packed_source(folder: Path, documents: list[list[int]]) -> dict[str, Any]:
    """The English source of tiny_config, its documents packed; each ends with 0."""
    dtype = token_dtype(VOCAB)
    assert dtype in CODES
    np.concatenate(documents).astype(dtype).tofile(folder / "x.bin")
    np.array([len(document) for document in documents], "<i4").tofile(folder / "x.lengths")
    found = pack_documents(str(folder / "x"), dtype, LENGTH, seed=1)
    prefix = folder / "packed"
    for kind in ("bin", "idx"):
        (folder / f"x.packed.{kind}").replace(f"{prefix}.{kind}")
    write_note(f"{prefix}.pack.json", PackNote(LENGTH, found.rows, found.tokens))
    return {
        "name": "en", "language": "en", "paths": [str(prefix)], "packed": True,
        "valid_paths": [str(folder / "en_valid_text_document")],
    }  # fmt: skip


def random_documents(number: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(9)
    return [[*rng.integers(1, VOCAB, int(n)).tolist(), 0] for n in rng.integers(1, longest, number)]


def packed_config(folder: Path, documents: list[list[int]], family: str = "gpt2", **leaves: Any) -> Config:
    """tiny_config with a packed English and a plain Korean source."""
    tiny_config(folder, family)  # writes the token files
    korean = {"name": "ko", "language": "ko", "paths": [str(folder / "ko_text_document")],
              "valid_paths": [str(folder / "ko_valid_text_document")]}  # fmt: skip
    return tiny_config(folder, family, sources=[packed_source(folder, documents), korean], **leaves)


def first_loss_and_documents_alone(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    """The loss of the first step, and the same from each document of its rows by itself."""
    run = tiny_run(mesh, cfg)
    (model,), total, count, documents = run.chunks, 0.0, 0, 0
    plan, streams = run.prepared.plan, run.prepared.streams
    for source, _, offset in zip(*plan.sampler().samples(0, cfg.train.global_batch_size), strict=True):
        assert source == 0
        row = streams[0].read(offset * LENGTH, (offset + 1) * LENGTH + 1)
        for text in np.split(row, np.flatnonzero(row == 0) + 1):
            if len(text) > 1:
                ids = torch.from_numpy(text)
                logits = model(ids[None, :-1]) @ model.head_weight[:VOCAB].T
                total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
                count, documents = count + len(text) - 1, documents + 1
    sums, counts = train_step(run, 1).by_source
    return {"loss": (sums.sum() / counts.sum()).item(), "alone": total / count, "documents": documents,
            "counted": counts.tolist(), "count": count}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_cost_what_their_documents_cost_alone(family: str, tmp_path: Path) -> None:
    stage = {"name": "one", "tokens": 8 * LENGTH, "weights": {"en": 1.0}}
    cfg = packed_config(tmp_path, random_documents(200, 9), family, stages=[stage], **APART)
    (found,) = run_ranks(first_loss_and_documents_alone, cfg)
    assert found["loss"] == pytest.approx(found["alone"], rel=1e-6)
    assert found["counted"] == [found["count"], 0] and found["documents"] > 20
    mixed = packed_config(tmp_path, random_documents(200, 9), family, stages=[stage])
    (other,) = run_ranks(first_loss_and_documents_alone, mixed)
    assert other["loss"] != pytest.approx(other["alone"], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "axes", "options"),
    [
        ("gpt2", {"tp": 2, "cp": 2}, {"sequence_parallel": True}),
        ("llama", {"pp": 2, "dp": 2}, {"pipeline_schedule": "zb-h1"}),
        ("gpt_neox", {"cp": 2, "pp": 2}, {"micro_batch_size": 2}),
    ],
)
def test_every_layout_reads_packed_rows_alike(
    family: str, axes: dict[str, int], options: dict[str, Any], tmp_path: Path
) -> None:
    documents = random_documents(60, 14)
    alone = run_ranks(steps_of, packed_config(tmp_path, documents, family, steps=STEPS, **APART), STEPS)[0]
    names = {"tp": "tensor_model_parallel_size", "cp": "context_parallel_size", "pp": "pipeline_model_parallel_size"}
    layout = {names[axis]: size for axis, size in axes.items() if axis != "dp"}
    cfg = packed_config(tmp_path, documents, family, steps=STEPS, **APART, **layout, **options)
    for of_rank in run_ranks(steps_of, cfg, STEPS, **axes):
        assert_same_training(of_rank, alone)
        assert of_rank["counts"] == alone["counts"]


def test_a_resumed_run_over_packed_rows_is_bit_equal(tmp_path: Path) -> None:
    cfg = packed_config(tmp_path, random_documents(60, 14), steps=STEPS, save_interval=3)
    whole = run_ranks(run_to_end, cfg)[0]
    elsewhere = str(tmp_path / "other")
    again = dataclasses.replace(
        cfg,
        logging=dataclasses.replace(cfg.logging, run_dir=elsewhere),
        checkpoint=dataclasses.replace(cfg.checkpoint, save=f"{elsewhere}/checkpoints"),
    )
    run_ranks(run_to_end, dataclasses.replace(again, train=dataclasses.replace(again.train, exit_interval=3)))
    prepared = tiny_prepared(again)
    started, plan = with_start(prepared, {}), prepared.plan
    assert started.start_step == 3 and started.is_resume and started.changes == ()
    fewer = dataclasses.replace(plan, sources=(dataclasses.replace(plan.sources[0], slices=9), plan.sources[1]))
    with pytest.raises(CheckpointError, match=rf"'en' was {plan.sources[0].slices} packed rows and is 9 packed rows"):
        with_start(dataclasses.replace(prepared, plan=fewer), {})
    resumed = run_ranks(run_to_end, again)[0]
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def rows_of_metrics(mesh: Mesh, cfg: Config, steps: int) -> list[dict[str, Any]]:
    run = tiny_run(mesh, cfg)
    metrics, rows = Metrics(run), []
    for step in range(1, steps + 1):
        metrics.add(step, train_step(run, step))
        rows.append(metrics.read())
        rows[-1]["line"] = progress_line(run, rows[-1], "1s")
    metrics.close()
    return rows


def test_metrics_count_text_and_agree_with_the_plan(tmp_path: Path) -> None:
    """Rows of 17 and of 9 tokens by turns: three quarters full."""
    documents = [[1 + i] * (16 if i % 2 else 8) + [0] for i in range(80)]
    stage = {"name": "one", "tokens": 112 * LENGTH, "non_english_share": 0.5}
    (rows,) = run_ranks(rows_of_metrics, packed_config(tmp_path, documents, stages=[stage]), 14)
    assert all(row["planned_share_by_source"] == {"en": 0.5, "ko": 0.5} for row in rows)
    served = {name: sum(row["tokens_by_source"].get(name, 0) for row in rows) for name in ("en", "ko")}
    assert served["en"] == pytest.approx(served["ko"], abs=2 * LENGTH)
    assert "non-English 50.0% of stage" in rows[-1]["line"]
    assert sum(served.values()) == pytest.approx(112 * LENGTH * 6 / 7, abs=2 * LENGTH)  # 64 samples of en, 48 of ko


@pytest.mark.parametrize("apart", [{}, APART], ids=["together", "apart"])
def test_batches_of_padding_alone_leave_all_finite(apart: dict[str, Any], tmp_path: Path) -> None:
    """One row has one token: the steps that read it have nothing to learn from."""
    documents = [[*([5] * 16), 0] for _ in range(6)] + [[*([8] * 17), 0]]  # of 18 tokens: a row, and one of its end
    stage = {"name": "one", "tokens": 20 * LENGTH, "weights": {"en": 1.0}, "seq_length": LENGTH // 4}
    cfg = packed_config(
        tmp_path, documents, stages=[stage], block_length=LENGTH, global_batch_size=4, **apart
    )  # fmt: skip
    (rows,) = run_ranks(rows_of_metrics, cfg, 20)
    assert any(not row["tokens_by_source"] for row in rows) and any(row["tokens_by_source"] for row in rows)
    assert all(math.isfinite(row["grad_norm"]) and math.isfinite(row["params_norm"]) for row in rows)
    assert all(math.isfinite(row["loss"]) == bool(row["tokens_by_source"]) for row in rows)
