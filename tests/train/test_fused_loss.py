"""Training with the fused output layer and loss is training with the plain ones."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import keep_first_gradients, tiny_config, tiny_run

from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.step import evaluate, train_step

STEPS = 10


def training(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    """First gradients, losses and held-out losses of a short training, whole on every rank."""
    run = tiny_run(mesh, cfg)
    gradients = keep_first_gradients(run)
    losses = []
    for step in range(1, STEPS + 1):
        sums, counts = train_step(run, step).by_source
        losses.append((sums / counts).tolist())
    before = run.buffers.grads.clone()
    held_out = evaluate(run)
    assert torch.equal(run.buffers.grads, before)
    return {
        "gradients": gradients,
        "losses": losses,
        "held_out": held_out.tolist(),
        "loss": run.chunks[0].backends.loss,
    }


def config(folder: Path, family: str, loss_backend: str, **layout: Any) -> Config:
    return tiny_config(folder, family, STEPS, loss_backend=loss_backend, micro_batch_size=2, **layout)


@functools.cache
def plain(folder: Path, family: str) -> dict[str, Any]:
    return run_ranks(training, config(folder, family, "torch"))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize(
    ("family", "tp", "pp", "sequence_parallel"),
    [("gpt2", 1, 1, False), ("gpt2", 2, 2, False), ("gpt2", 2, 1, True), ("llama", 2, 2, False), ("llama", 2, 1, True)],
)
def test_fused_loss_trains_like_the_plain_one(
    family: str, tp: int, pp: int, sequence_parallel: bool, folder: Path
) -> None:
    cfg = config(
        folder, family, "fused_linear",
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    wanted = plain(folder, family)
    assert wanted["loss"] == "torch"
    for fused in run_ranks(training, cfg, tp=tp, pp=pp):
        assert fused["loss"] == "fused_linear"
        for name, gradient in wanted["gradients"].items():
            error = (fused["gradients"][name] - gradient).norm()
            # The key's part of a qkv bias is zero in theory: softmax does not see a shift that all keys share.
            size = max(g.norm() for g in wanted["gradients"].values()) if name.endswith("qkv.bias") else gradient.norm()
            assert error <= 1e-5 * size, f"{name}: relative error {error / size:.2e}"
        for mine, theirs in ((fused["losses"], wanted["losses"]), (fused["held_out"], wanted["held_out"])):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-5, atol=0)
