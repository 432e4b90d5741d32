"""The sharded AdamW and the global norm against torch's own on whole parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megapoly_kernels import Range
from ranks import assemble, run_ranks
from tiny_runs import tiny_config, tiny_run

from megapoly.checkpoint.state import pieces, training_state
from megapoly.optim.clip import clip_coefficient
from megapoly.optim.groups import Rules
from megapoly.optim.sharded import ShardedOptimizer, update_ranges
from megapoly.optim.spans import spans_of
from megapoly.parallel.gradients import FlatBuffers
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.parallel.rng import normal_shard
from megapoly.sections import Config, OptimizerConfig


def gradient(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    return normal_shard(shape, 1.0, step, name, (0,) * len(shape), shape)


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
        norm = run.optimizer.global_norm(owned)
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


def test_the_scale_is_that_of_the_gradients(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "llama", bf16=True, weight_decay=0.5)
    run, other = (tiny_run(single_process_mesh(), cfg) for _ in range(2))
    grad = torch.randn_like(run.optimizer.master)
    run.optimizer.step(grad.clone(), 0.01, torch.tensor(0.3, dtype=torch.float64))
    other.optimizer.step(grad * 0.3, 0.01)
    assert torch.equal(run.optimizer.master, other.optimizer.master)
    assert torch.equal(run.optimizer.exp_avg_sq.flat, other.optimizer.exp_avg_sq.flat)
    assert torch.equal(run.buffers.params, run.optimizer.master.bfloat16())


def train_with_frozen(mesh: Mesh, cfg: Config) -> None:
    """Freeze a matrix and a norm; assert that they keep their bits, are not counted, and that all else moves."""
    run = tiny_run(mesh, cfg)
    b = run.buffers
    frozen = [s for s in b.segments if "mlp" in s.name and s.is_decayed][:1] + b.segments[-1:]
    for segment in frozen:
        segment.parameter.requires_grad_(False)
    optimizer = ShardedOptimizer(b, Rules(cfg.optimizer, cfg.model))
    is_frozen, is_padding = torch.zeros(b.size, dtype=torch.bool), torch.ones(b.size, dtype=torch.bool)
    for segment in b.segments:
        is_padding[segment.begin : segment.end] = False
        is_frozen[segment.begin : segment.end] = segment in frozen
    before, master = b.params.clone(), optimizer.master.clone()
    grad = torch.randn(b.size, generator=torch.Generator().manual_seed(1))
    owned = owned_of(b, grad)
    expected = grad[~is_frozen & ~is_padding].double().norm().item()
    assert optimizer.global_norm(owned).item() == pytest.approx(expected, rel=1e-6)
    for _ in range(2):
        optimizer.step(owned.clone(), 0.1)
    b.wait_params()
    stays = owned_of(b, is_frozen | is_padding)
    assert torch.equal(optimizer.master[stays], master[stays])
    assert (optimizer.master[~stays] != master[~stays]).all()
    for moment in (optimizer.exp_avg.flat, optimizer.exp_avg_sq.flat):
        assert not moment[stays].any() and moment[~stays].all()
    assert torch.equal(b.params[is_frozen], before[is_frozen]) and not torch.equal(b.params, before)


def owned_of(buffers: FlatBuffers, flat: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a flat quantity that every rank has whole."""
    return torch.cat([buffers.own_part(bucket, flat[bucket.flat]) for bucket in buffers.buckets])


@pytest.mark.parametrize(("bf16", "dp"), [(False, 1), (True, 3)])
def test_frozen_parameters_keep_their_bits_and_do_not_count(bf16: bool, dp: int, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", bf16=bf16, weight_decay=0.5, ddp_bucket_size=100_000)
    run_ranks(train_with_frozen, cfg, dp=dp)


def test_update_ranges_are_one_for_matrices_and_one_for_the_rest(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2")
    b = tiny_run(single_process_mesh(), cfg).buffers

    def ranges(**options: Any) -> list[Range]:
        rules = Rules(OptimizerConfig(**options), cfg.model)
        (span,) = spans_of(b, rules)
        return update_ranges(span, rules)

    border = max(s.end for s in b.segments if s.is_decayed)
    assert ranges(weight_decay=0.5) == [Range(0, border, 0.5), Range(border, b.segments[-1].end)]
    assert len(ranges(weight_decay=0.0)) == 2
    assert len(ranges(weight_decay=0.5, no_weight_decay_embeddings=True)) == 3
    for segment in b.segments:
        segment.parameter.requires_grad_(False)
    assert ranges(weight_decay=0.5) == []
