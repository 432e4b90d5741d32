"""The sharded AdamW and the global norm against torch's own on whole parameters."""

from pathlib import Path

import pytest
import torch
from ranks import assemble, run_ranks
from tiny_runs import tiny_config, tiny_run

from megapoly.checkpoint.state import pieces, training_state
from megapoly.config import Config
from megapoly.optim.clip import clip_coefficient, global_norm
from megapoly.parallel.mesh import Mesh
from megapoly.parallel.rng import normal_shard


def gradient(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    return normal_shard(shape, 1.0, step, name, None, 0, 0)


def three_steps(mesh: Mesh, cfg: Config) -> tuple[dict, dict, float]:
    """Weights before and after three updates with known gradients, and the norm of the last ones."""
    run = tiny_run(mesh, cfg)
    before = assemble(pieces(run.buffers, {"model": run.optimizer.master}, for_saving=True))
    norm = torch.zeros(())
    for step in (1, 2, 3):
        owned = torch.zeros_like(run.optimizer.master)
        for piece in pieces(run.buffers, {"grad": owned}, for_saving=False):
            whole = gradient(piece.name, piece.shape, step)
            place = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.tensor.shape, strict=True))
            piece.tensor.copy_(whole[place])
        norm = global_norm(owned, run.buffers)
        run.optimizer.step(owned, lr=0.01)
    return before, assemble(pieces(run.buffers, training_state(run.optimizer), for_saving=True)), norm.item()


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 2), (1, 3, 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sharded_adamw_is_adamw_with_decayed_matrices(
    family: str, layout: tuple[int, int, int], tmp_path: Path
) -> None:
    tp, pp, dp = layout
    cfg = tiny_config(
        tmp_path, family, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, weight_decay=0.5
    )
    before, after, norm = run_ranks(three_steps, cfg, tp=tp, pp=pp, dp=dp)[0]
    square = 0.0
    for key, start in before.items():
        name = key.removeprefix("model.")
        is_matrix = name.endswith("weight") and "norm" not in name
        parameter = torch.nn.Parameter(start.clone())
        reference = torch.optim.AdamW(
            [parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5 if is_matrix else 0.0
        )
        for step in (1, 2, 3):
            parameter.grad = gradient(f"grad.{name}", tuple(start.shape), step)
            reference.step()
        assert parameter.grad is not None
        square += parameter.grad.double().square().sum().item()
        torch.testing.assert_close(after[key], parameter.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after[f"exp_avg.{name}"], reference.state[parameter]["exp_avg"])
    assert norm == pytest.approx(square**0.5, rel=1e-6)


def test_clipping() -> None:
    assert clip_coefficient(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25, rel=1e-6)
    assert clip_coefficient(torch.tensor(0.5), 1.0).item() == 1.0
    assert clip_coefficient(torch.tensor(50.0), 0.0).item() == 1.0
