"""A tied matrix that all pipeline ranks share: one parameter over all of them, and the embedding's copy of it."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_gradients import SMALL, starts_of_steps, training
from test_parity import STEPS, assert_same_training, steps_of
from tiny_runs import VOCAB, tiny_config, tiny_run

from megapoly.checkpoint.load import CheckpointReader
from megapoly.hf.export import export
from megapoly.parallel.buckets import WORD
from megapoly.parallel.collectives import all_gather
from megapoly.parallel.mesh import Layout, Mesh
from megapoly.sections import Config
from megapoly.train.loop import train
from megapoly.train.step import evaluate, train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def on(cfg: Config, dp: int) -> dict[str, Any]:
    layout = Layout.of(cfg)
    return {name: getattr(layout, name) for name in ("tp", "cp", "pp", "instances", "shares_vocab")} | {"dp": dp}


def shared(folder: Path, steps: int = STEPS, pp: int = 2, family: str = "gpt2", **leaves: Any) -> Config:
    return tiny_config(
        folder, family, steps, pipeline_model_parallel_size=pp, pipeline_vocab_parallel=True,
        **({"untie_embeddings_and_output_weights": False} | leaves),
    )  # fmt: skip


@functools.cache
def reference(folder: Path, family: str, leaves: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    cfg = tiny_config(folder, family, STEPS, untie_embeddings_and_output_weights=False, **dict(leaves))
    return run_ranks(steps_of, cfg)[0]


TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}


# With 1 the last of four parts has one row of padding, with 512 the last two have nothing else.
@pytest.mark.parametrize(
    ("family", "pp", "dp", "layout", "model"),
    [
        ("gpt2", 2, 1, TP, {}),
        ("gpt2", 2, 1, SP, {"make_vocab_size_divisible_by": 1}),
        ("gpt2", 2, 1, TP, {"make_vocab_size_divisible_by": 512}),
        ("gpt2", 3, 2, {"ddp_bucket_size": SMALL, "pipeline_layer_split": [0, 3, 0]}, {}),
        ("llama", 3, 1, {"pipeline_layer_split": [0, 2, 1]}, {"make_vocab_size_divisible_by": 1, "lr": 3e-4}),
        ("gpt2", 2, 4, {"num_distributed_optimizer_instances": 2, "overlap_grad_reduce": False}, {}),
        ("gpt2", 2, 2, {"context_parallel_size": 2, "overlap_param_gather": False}, {}),
        ("gpt2", 2, 2, SP | {"tp_comm_overlap": True}, {"optimizer": "muon"}),
        ("gpt_neox", 2, 1, {"recompute_granularity": "full"}, {"no_weight_decay_embeddings": True}),
    ],
)  # fmt: skip
def test_every_layout_trains_like_one_process(
    family: str, pp: int, dp: int, layout: dict[str, Any], model: dict[str, Any], folder: Path
) -> None:
    cfg = shared(folder, pp=pp, family=family, **layout, **model)
    for of_rank in run_ranks(steps_of, cfg, **on(cfg, dp)):
        assert_same_training(of_rank, reference(folder, family, tuple(model.items())))


def one_matrix(mesh: Mesh, cfg: Config) -> None:
    """Assert that a rank holds its rows alone, and the first of a pipeline a copy, which is what the ranks hold."""
    run = tiny_run(mesh, cfg)
    assert run.head is not None and run.head.tied is not None
    tied, seen = run.head.tied, []
    named = [(s.name, s.parameter) for s in run.buffers.segments if s.name in (WORD, "head.weight")]
    assert [(name, parameter is tied.weight) for name, parameter in named] == [(WORD, True)]
    assert (tied.copy is None) == (mesh.pp.rank > 0)

    for step in (1, 2, 3):
        evaluate(run)
        run.buffers.wait_params()
        parts = all_gather(tied.weight.detach(), mesh.vocab).view(mesh.pp.size, mesh.tp.size, *tied.weight.shape)
        assert not seen or not torch.equal(parts, seen[-1])
        seen.append(parts)
        if tied.copy is not None:
            assert torch.equal(tied.copy.rows.view(mesh.pp.size, *tied.weight.shape), parts[:, mesh.tp.rank])
            assert not tied.copy.gradient.any()
        train_step(run, step)


@pytest.mark.parametrize(("bf16", "tp", "pp", "dp"), [(False, 2, 2, 1), (True, 1, 3, 2), (True, 2, 2, 2)])
def test_the_first_pipeline_rank_looks_up_in_what_all_of_them_hold(
    bf16: bool, tp: int, pp: int, dp: int, folder: Path
) -> None:
    cfg = shared(folder, pp=pp, bf16=bf16, tensor_model_parallel_size=tp, sequence_parallel=tp > 1)
    run_ranks(one_matrix, cfg, **on(cfg, dp))


def waits(mesh: Mesh, cfg: Config) -> list[int]:
    """How many buckets are still on their way when the copy is made, which is not before its own has come."""
    run = tiny_run(mesh, cfg)
    assert run.head is not None and run.head.tied is not None
    (own,) = {s.bucket.number for s in run.buffers.segments if s.name == WORD}
    waiting: list[int] = []

    def look(*_: Any) -> None:
        assert own not in run.buffers._gathers
        waiting.append(len(run.buffers._gathers))

    run.head.tied.register_forward_pre_hook(look)
    for step in (1, 2):
        train_step(run, step)
    return waiting


def test_the_copy_waits_for_its_own_bucket_only(folder: Path) -> None:
    cfg = shared(folder, ddp_bucket_size=SMALL)
    for first, second in run_ranks(waits, cfg, **on(cfg, 2)):
        assert first == 0 and second > 1


@pytest.mark.parametrize("bf16", [False, True])
def test_overlap_changes_no_bit(bf16: bool, folder: Path) -> None:
    apart = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    cfg, plain = (shared(folder, bf16=bf16, ddp_bucket_size=SMALL, **leaves) for leaves in ({}, apart))
    expected = run_ranks(training, plain, **on(plain, 2))
    for of_rank, of_plain in zip(run_ranks(training, cfg, **on(cfg, 2)), expected, strict=True):
        for key in ("losses", "held_out", "state", "params"):
            assert of_rank[key] == of_plain[key], key


@pytest.mark.parametrize("loss", ["torch", "fused_linear"])
def test_the_matrix_is_reduced_last_and_whole(loss: str, folder: Path) -> None:
    cfg = shared(folder, ddp_bucket_size=SMALL, loss_backend=loss)
    for of_rank in run_ranks(starts_of_steps, cfg, **on(cfg, 2)):
        buckets = len(of_rank["names"])
        assert [number for _, number in of_rank["starts"]] == 2 * list(range(buckets))
        assert of_rank["names"][-1] == [WORD]
        assert of_rank["before_finish"] == [buckets - 1, 2 * buckets - 1]


def test_bf16_is_within_its_rounding_of_one_process(folder: Path) -> None:
    """Losses; and the matrix's gradient, of which head and embedding are summed in fp32."""
    alone = run_ranks(steps_of, tiny_config(folder, "gpt2", STEPS, bf16=True), 8)[0]
    cfg, eps = shared(folder, bf16=True, **SP), torch.finfo(torch.bfloat16).eps
    for of_rank in run_ranks(steps_of, cfg, 8, **on(cfg, 2)):
        assert all(torch.equal(of_rank["weights"][name], weight) for name, weight in alone["weights"].items())
        gradient, other = (result["gradients"][f"grad.{WORD}"] for result in (alone, of_rank))
        assert (other - gradient).norm() <= 2 * eps * gradient.norm()
        assert of_rank["losses"] == pytest.approx(alone["losses"], rel=eps)


def trained(mesh: Mesh, cfg: Config) -> None:
    train(tiny_run(mesh, cfg))


def test_an_odd_vocabulary_is_saved_once_and_exported_without_padding(tmp_path: Path) -> None:
    cfg = shared(tmp_path, 2, pp=3, make_vocab_size_divisible_by=1, num_query_groups=6)
    run_ranks(trained, cfg, **on(cfg, 1))
    reader = CheckpointReader.open(tmp_path / "run")
    assert "head.weight" not in reader.names and reader.get(WORD).shape == (VOCAB, 144)
    exported = load_file(export(reader, tmp_path / "hf") / "model.safetensors")
    assert torch.equal(exported["transformer.wte.weight"], reader.get(WORD))
    assert "lm_head.weight" not in exported
