"""AdamW over ranges and sums of squares, interpreted, against float64 and torch's own optimizer."""

import itertools
from pathlib import Path

import pytest
import torch
from comparison import close, random
from megapoly_kernels import Range, RangeTable, adamw_, squared_norm
from megapoly_kernels.adamw import BLOCK
from ranks import run_ranks
from tiny_runs import tiny_config, tiny_run
from torch import Tensor

from megapoly.optim.groups import Rules
from megapoly.optim.sharded import ShardedOptimizer
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config

CPU = torch.device("cpu")
LENGTH = 4 * BLOCK
# Borders at, beside and between those of blocks; one block is whole. 5 to 17, 4095 to 4097 and others are frozen.
RANGES = [
    Range(0, 1, 0.1),
    Range(1, 5),
    Range(17, 2048, 0.3, 0.25),
    Range(2048, 4095),
    Range(4097, 8191, 0.1),
    Range(8191, 12295, 0.2, 0.3),
    Range(12300, 12301, 0.1),
    Range(12301, 12301, 0.7),
    Range(13312, 16383, 0.2),
]
OPTIONS = {"lr": 0.02, "beta1": 0.9, "beta2": 0.999, "eps": 1e-3}


def state(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Master weights and moments as they are in mid-training."""
    return random(length, seed=1), random(length, seed=2), random(length, seed=3).square()


def rules(ranges: list[Range], length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """(which entries are in a range, the decay of each, the factor of its learning rate), entry by entry."""
    is_trained = torch.zeros(length, dtype=torch.bool)
    decay, rate = (torch.zeros(length, dtype=torch.float64) for _ in range(2))
    for begin, end, weight_decay, lr_scale in ranges:
        is_trained[begin:end], decay[begin:end], rate[begin:end] = True, weight_decay, lr_scale
    return is_trained, decay, rate


@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_three_steps_follow_the_formula_and_leave_the_rest_alone(copy: torch.dtype | None, scale: float | None) -> None:
    master, exp_avg, exp_avg_sq = state()
    params = None if copy is None else random(LENGTH, seed=4, dtype=copy)
    before = [x if x is None else x.clone() for x in (master, exp_avg, exp_avg_sq, params)]
    x, m, v = master.double(), exp_avg.double(), exp_avg_sq.double()
    table = RangeTable.build(RANGES, CPU)
    is_trained, decay, rate = rules(RANGES)
    for step in (7, 8, 9):
        grad = random(LENGTH, seed=10 + step, scale=3.0)
        g = grad.double() * (scale or 1.0)
        adamw_(
            master, grad, exp_avg, exp_avg_sq, step, table, **OPTIONS, params=params, backend="triton",
            scale=None if scale is None else torch.tensor(scale),
        )  # fmt: skip
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x * (1 - 0.02 * rate * decay) - 0.02 * rate * (m / (1 - 0.9**step)) / (
            (v / (1 - 0.999**step)).sqrt() + 1e-3
        )
    for got, expected in ((master, x), (exp_avg, m), (exp_avg_sq, v)):
        close(got[is_trained], expected[is_trained], fp32_roundings=4)
    if params is not None:
        assert torch.equal(params[is_trained], master[is_trained].to(params.dtype))
    for got, old in zip((master, exp_avg, exp_avg_sq, params), before, strict=True):
        assert got is None or old is None or torch.equal(got[~is_trained], old[~is_trained])


def test_a_scale_of_nan_changes_nothing() -> None:
    flat = [*state(), random(LENGTH, seed=4, dtype=torch.bfloat16)]
    before = [x.clone() for x in flat]
    scale = torch.tensor(torch.nan, dtype=torch.float64)
    adamw_(
        flat[0], random(LENGTH, seed=5), flat[1], flat[2], 7, RangeTable.build(RANGES, CPU), **OPTIONS,
        params=flat[3], backend="triton", scale=scale,
    )  # fmt: skip
    assert all(map(torch.equal, flat, before))


@pytest.mark.parametrize("step", [1, 1000])
def test_agrees_with_torch(step: int) -> None:
    master, exp_avg, exp_avg_sq = state()
    parameter = torch.nn.Parameter(master.clone())
    oracle = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    oracle.state[parameter] = {
        "step": torch.tensor(float(step - 1)), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone(),
    }  # fmt: skip
    grad = random(LENGTH, seed=5)
    parameter.grad = grad.clone()
    oracle.step()
    table = RangeTable.build([Range(0, LENGTH, 0.1)], CPU)
    adamw_(master, grad, exp_avg, exp_avg_sq, step, table, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, backend="triton")
    close(master, parameter.detach(), fp32_roundings=2)
    close(exp_avg, oracle.state[parameter]["exp_avg"], fp32_roundings=2)
    close(exp_avg_sq, oracle.state[parameter]["exp_avg_sq"], fp32_roundings=2)


def test_eps_is_added_after_the_root_and_its_correction() -> None:
    # Tiny gradients: eps decides. m / (1 - beta1) = g, v / (1 - beta2) = g^2 in the first step.
    grad = torch.full((5,), 1e-6)
    master = torch.zeros(5)
    table = RangeTable.build([Range(0, 5)], CPU)
    adamw_(
        master, grad, torch.zeros(5), torch.zeros(5), 1, table, lr=1.0, beta1=0.9, beta2=0.95, eps=1e-6,
        backend="triton",
    )  # fmt: skip
    close(master, torch.full((5,), -0.5), fp32_roundings=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_is_read_from_the_device(dtype: torch.dtype) -> None:
    master, exp_avg, exp_avg_sq = state(9)
    expected = [x.clone() for x in (master, exp_avg, exp_avg_sq)]
    table = RangeTable.build([Range(0, 7, 0.1)], CPU)
    grad = random(9, seed=6)
    kept = grad.clone()
    adamw_(
        master, grad, exp_avg, exp_avg_sq, 3, table, **OPTIONS, backend="triton", scale=torch.tensor(0.25, dtype=dtype)
    )
    assert torch.equal(grad, kept)
    adamw_(expected[0], grad * 0.25, *expected[1:], 3, table, **OPTIONS, backend="triton")
    for a, b in zip((master, exp_avg, exp_avg_sq), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_nothing_to_do() -> None:
    empty = RangeTable.build([], CPU)
    adamw_(*(torch.empty(0) for _ in range(4)), 1, empty, **OPTIONS, params=torch.empty(0), backend="triton")
    master, exp_avg, exp_avg_sq = state(6)
    kept = master.clone()
    adamw_(master, random(6, seed=7), exp_avg, exp_avg_sq, 1, empty, **OPTIONS, backend="triton")
    assert torch.equal(master, kept)
    for x in (torch.empty(0), master):
        norm = squared_norm(x, empty, "triton")
        assert norm.dtype == torch.float64 and norm.item() == 0.0


@pytest.mark.parametrize("end", [1, 5, 4095, 4096, 4097, 8191, 8192])
def test_squared_norm_at_odd_borders(end: int) -> None:
    x = random(LENGTH, seed=8)
    for begin in {0, 1, min(end, 4096) - 1, end - 1}:
        total = squared_norm(x, RangeTable.build([Range(begin, end)], CPU), "triton")
        assert total.dtype == torch.float64 and total.shape == ()
        assert total.item() == pytest.approx(x[begin:end].double().square().sum().item(), rel=2e-6)


def test_squared_norm_counts_what_is_in_the_ranges_the_same_each_time() -> None:
    # More blocks than programs, so that each program walks over several.
    x = random(37 * BLOCK + 11, seed=9)
    ranges = [Range(i * 777, i * 777 + 700) for i in range(80)] + [Range(20 * BLOCK + 3, 37 * BLOCK + 10)]
    table = RangeTable.build(ranges, CPU)
    totals = [squared_norm(x, table, "triton") for _ in range(2)]
    assert torch.equal(*totals)
    is_counted, *_ = rules(ranges, len(x))
    assert totals[0].item() == pytest.approx(x[is_counted].double().square().sum().item(), rel=1e-6)
    x[~is_counted] = torch.inf
    assert torch.equal(squared_norm(x, table, "triton"), totals[0])


def test_operations_are_declared_as_torch_wants() -> None:
    master, exp_avg, exp_avg_sq = state(5)
    table = RangeTable.build([Range(0, 3, 0.1), Range(4, 5)], CPU)
    blocks = (table.block_N, table.low_N, table.high_N)
    arguments = (
        master, random(5, seed=1), exp_avg, exp_avg_sq, random(5, seed=2).bfloat16(), torch.tensor(0.5),
        *blocks, table.decay_N, table.rate_N, 1, 0.1, 0.9, 0.95, 1e-8,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.megapoly.adamw_, arguments)
    torch.library.opcheck(torch.ops.megapoly.squared_norm, (master, *blocks))


def test_tables_cover_every_entry_once() -> None:
    for begin, end in itertools.combinations((0, 1, 4095, 4096, 4097, 9000, 12288), 2):
        table = RangeTable.build([Range(begin, end, 0.5)], CPU)
        times = torch.zeros(12288)
        for block, low, high in zip(*(t.tolist() for t in (table.block_N, table.low_N, table.high_N)), strict=True):
            assert 0 <= low < high <= BLOCK
            times[block * BLOCK + low : block * BLOCK + high] += 1
        assert (times[begin:end] == 1).all() and times.sum() == end - begin and (table.decay_N == 0.5).all()


def steps_by_backend(mesh: Mesh, cfg: Config) -> list[list[Tensor]]:
    """For each backend: norm of the gradients, and weights, moments and parameters after two updates."""
    results = []
    for backend in ("torch", "triton"):
        run = tiny_run(mesh, cfg)
        run.buffers.segments[1].parameter.requires_grad_(False)
        optimizer = ShardedOptimizer(run.buffers, Rules(cfg.optimizer, cfg.model), backend)
        norm = torch.zeros(())
        for step in (1, 2):
            grad = random(len(optimizer.master), seed=step + 10 * mesh.dp.rank)
            norm = optimizer.global_norm(grad)
            optimizer.step(grad, 0.01, 1 / norm)
        run.buffers.wait_params()
        results.append([norm, optimizer.master, optimizer.exp_avg.flat, optimizer.exp_avg_sq.flat, run.buffers.params])
    return results


@pytest.mark.parametrize(("bf16", "dp"), [(True, 1), (True, 2), (False, 2)])
def test_the_sharded_optimizer_does_the_same_with_kernels(bf16: bool, dp: int, tmp_path: Path) -> None:
    small = {"hidden_size": 24, "ffn_hidden_size": 40, "num_layers": 1}
    cfg = tiny_config(tmp_path, "gpt2", bf16=bf16, weight_decay=0.5, **small)
    for expected, got in run_ranks(steps_by_backend, cfg, dp=dp):
        assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
        for a, b in zip(got[1:], expected[1:], strict=True):
            close(a, b, roundings=1, fp32_roundings=8)
