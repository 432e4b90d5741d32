"""The first promise: any layout gives the single process's weights bit for bit, and its losses and gradients."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import assemble, run_ranks
from tiny_runs import FAMILIES, keep_first_gradients, tiny_config, tiny_run

from megapoly.checkpoint.state import pieces, training_state
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.step import evaluate, train_step

STEPS = 20
LAYOUTS = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
CELLS = [(*layout, sp) for layout in LAYOUTS for sp in ((False, True) if layout[0] > 1 else (False,))]


def steps_of(mesh: Mesh, cfg: Config, steps: int = STEPS) -> dict[str, Any]:
    """Initial weights, first gradients, losses and gradient norms of a short training, whole on every rank."""
    run = tiny_run(mesh, cfg)
    weights = assemble(pieces(run.buffers, {"model": training_state(run.optimizer)["model"]}, for_saving=True))
    gradients = keep_first_gradients(run)
    losses, norms, by_source = [], [], []
    for step in range(1, steps + 1):
        stats = train_step(run, step)
        sums, counts = stats.by_source
        losses.append((sums.sum() / counts.sum()).item())
        by_source.append(counts.tolist())
        norms.append(stats.grad_norm.item())
    held_out = evaluate(run)
    return {
        "weights": weights,
        "gradients": gradients,
        "losses": losses,
        "norms": norms,
        "counts": by_source,
        "held_out": (held_out[0] / held_out[1]).tolist(),
        "held_out_tokens": held_out[1].tolist(),
    }


@functools.cache
def reference(family: str, folder: Path) -> dict[str, Any]:
    return run_ranks(steps_of, tiny_config(folder, family, STEPS))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def assert_same_training(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        assert torch.equal(mine["weights"][name], weight), f"initial {name} differs"
    whole_norm = torch.stack([g.norm() for g in theirs["gradients"].values()]).norm()
    for name, gradient in theirs["gradients"].items():
        error = (mine["gradients"][name] - gradient).norm()
        if name.endswith("qkv.bias"):
            # The key's part is zero in theory: softmax does not see a shift that all keys share.
            assert error <= 1e-5 * whole_norm, f"{name}: {error / whole_norm:.2e} of the global norm"
        else:
            assert error <= 1e-5 * gradient.norm(), f"{name}: relative error {error / gradient.norm():.2e}"
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    assert mine["held_out"] == pytest.approx(theirs["held_out"], rel=1e-5)
    assert mine["counts"] == theirs["counts"]
    assert mine["held_out_tokens"] == theirs["held_out_tokens"]


@pytest.mark.parametrize(("tp", "pp", "dp", "sequence_parallel"), CELLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_trains_like_one_process(
    family: str, tp: int, pp: int, dp: int, sequence_parallel: bool, folder: Path
) -> None:
    cfg = tiny_config(
        folder, family, STEPS,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    for of_rank in run_ranks(steps_of, cfg, tp=tp, pp=pp, dp=dp):
        assert_same_training(of_rank, reference(family, folder))


@pytest.mark.parametrize(
    ("family", "tp", "pp", "dp", "layer_split"),
    [("gpt2", 2, 3, 1, None), ("llama", 1, 3, 2, [0, 3, 0]), ("gpt_neox", 2, 2, 2, [3, 0])],
)
def test_larger_micro_batches_uneven_stages_and_a_short_last_batch(
    family: str, tp: int, pp: int, dp: int, layer_split: list[int] | None, tmp_path: Path
) -> None:
    def cfg(**layout: Any) -> Config:
        return tiny_config(tmp_path, family, STEPS, micro_batch_size=2, train_samples=STEPS * 8 - 3, **layout)

    alone = run_ranks(steps_of, cfg())[0]
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "pipeline_layer_split": layer_split}
    together = run_ranks(steps_of, cfg(sequence_parallel=tp > 1, **layout), tp=tp, pp=pp, dp=dp)
    assert sum(together[0]["counts"][-1]) == 5 * 16
    assert_same_training(together[0], alone)


@pytest.mark.parametrize(
    ("family", "tp", "pp", "dp", "schedule", "chunks"),
    [
        ("gpt2", 1, 2, 1, "interleaved", 2), ("gpt2", 2, 2, 1, "zb-v", None), ("gpt2", 1, 1, 2, "interleaved", 3),
        ("llama", 1, 2, 2, "zb-h1", None), ("gpt_neox", 1, 3, 1, "gpipe", None), ("llama", 2, 2, 1, "interleaved", 2),
        ("gpt_neox", 1, 2, 1, "zb-v", 2),
    ],
)  # fmt: skip
def test_every_schedule_trains_like_one_process(
    family: str, tp: int, pp: int, dp: int, schedule: str, chunks: int | None, folder: Path
) -> None:
    cfg = tiny_config(
        folder, family, STEPS, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1, pipeline_schedule=schedule, num_virtual_stages_per_pipeline_rank=chunks,
    )  # fmt: skip
    for of_rank in run_ranks(steps_of, cfg, tp=tp, pp=pp, dp=dp):
        assert_same_training(of_rank, reference(family, folder))


@pytest.mark.parametrize(
    ("family", "tp", "pp", "dp", "loss_backend"),
    [("llama", 1, 2, 1, "torch"), ("gpt_neox", 2, 2, 1, "torch"), ("llama", 1, 4, 1, "fused_linear"),
     ("gpt_neox", 2, 2, 2, "fused_linear"), ("llama", 2, 4, 1, "fused_linear"), ("llama", 1, 1, 2, "fused_linear"),
     # Of tied matrices:
     ("gpt2", 1, 2, 1, "torch"), ("gpt2", 2, 2, 1, "fused_linear"), ("gpt2", 1, 4, 1, "fused_linear"),
     ("gpt2", 2, 2, 2, "fused_linear"), ("gpt2", 2, 3, 1, "torch"), ("gpt2", 2, 1, 1, "fused_linear")],
)  # fmt: skip
def test_a_head_shared_by_all_pipeline_ranks_trains_like_one_process(
    family: str, tp: int, pp: int, dp: int, loss_backend: str, folder: Path
) -> None:
    cfg = tiny_config(
        folder, family, STEPS, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1, pipeline_vocab_parallel=True, loss_backend=loss_backend,
    )  # fmt: skip
    for of_rank in run_ranks(steps_of, cfg, tp=tp, pp=pp, dp=dp, shares_vocab=True):
        assert_same_training(of_rank, reference(family, folder))


def tied_matrix(mesh: Mesh, cfg: Config) -> dict[str, torch.Tensor]:
    """The first gradient of a tied matrix, and this rank's copy of it after two steps."""
    run = tiny_run(mesh, cfg)
    gradients = keep_first_gradients(run)
    for step in (1, 2):
        train_step(run, step)
    held = [p for chunk in run.chunks for n, p in chunk.named_parameters() if n == "embedding.word.weight"]
    assert all(copy is held[0] for copy in held), "one rank holds two"
    return {"gradient": gradients["grad.embedding.word.weight"], "copies": [copy.detach() for copy in held[:1]]}


@pytest.mark.parametrize(("pp", "schedule"), [(2, "1f1b"), (2, "interleaved"), (2, "zb-v"), (1, "interleaved")])
def test_a_matrix_tied_across_stages_is_one(pp: int, schedule: str, folder: Path) -> None:
    alone = run_ranks(tied_matrix, tiny_config(folder, "gpt2", STEPS))[0]
    cfg = tiny_config(folder, "gpt2", STEPS, pipeline_model_parallel_size=pp, pipeline_schedule=schedule)
    ranks = run_ranks(tied_matrix, cfg, pp=pp)
    error = (ranks[0]["gradient"] - alone["gradient"]).norm() / alone["gradient"].norm()
    assert error <= 1e-6
    copies = [copy for of_rank in ranks for copy in of_rank["copies"]]
    assert len(copies) == (1 if schedule == "zb-v" else pp)
    assert all(torch.equal(copy, copies[0]) for copy in copies), "the copies drift apart"


def test_the_reference_learns(folder: Path) -> None:
    losses = reference("gpt2", folder)["losses"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1.0, losses
