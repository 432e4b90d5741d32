"""Muon: what Newton-Schulz makes, whole matrices of packed parameters, and the sharded update against torch's own."""

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import assemble, run_ranks
from test_sharded import gradient
from tiny_runs import tiny_config, tiny_run

from megapoly.checkpoint.state import pieces, training_state
from megapoly.optim.groups import is_hidden_matrix
from megapoly.optim.muon import deal, flops, matrices, newton_schulz, orthogonalize_
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config


def with_singular_values(rows: int, columns: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A random matrix of these singular values, and its orthogonal factor U V^T."""
    generator = torch.Generator().manual_seed(rows + columns)
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return u @ values.diag() @ v.T, u @ v.T


@pytest.mark.parametrize("shape", [(48, 48), (96, 40), (40, 96)])
def test_newton_schulz_brings_singular_values_near_one_along_the_polar_factor(shape: tuple[int, int]) -> None:
    values = torch.logspace(-2, 0, min(shape), dtype=torch.float64)
    x, polar = with_singular_values(*shape, values)
    for scale in (1.0, 1e-12, 1e9):
        made = newton_schulz((scale * x).float(), 5).double()
        got = torch.linalg.svdvals(made)
        assert got.min() > 0.68 and got.max() < 1.21
        # The singular vectors are those of x: what is made is symmetric and positive in the polar factor's frame.
        frame = polar.T @ made if shape[0] >= shape[1] else made @ polar.T
        torch.testing.assert_close(frame, frame.T, rtol=0, atol=1e-3)
        assert torch.linalg.eigvalsh(frame).min() > 0.67
        assert torch.nn.functional.cosine_similarity(made.flatten(), polar.flatten(), dim=0) > 0.98
    assert not newton_schulz(torch.zeros(shape), 5).any()


def test_newton_schulz_is_torchs() -> None:
    x = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    oracle = torch.optim._muon._zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(newton_schulz(x.bfloat16(), 5), oracle, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps)


def test_packed_parameters_are_orthogonalised_matrix_by_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3 + 2, 4, 20, generator=generator)  # 2 groups of 3 query heads of width 4, 20 inputs
    made = qkv.clone()
    orthogonalize_(made, 5, 0.2)
    heads = {"q": (qkv[:, :3], made[:, :3]), "k": (qkv[:, 3], made[:, 3]), "v": (qkv[:, 4], made[:, 4])}
    for name, (before, after) in heads.items():
        flat = before.reshape(-1, 20)
        assert flat.shape == ((24, 20) if name == "q" else (8, 20))
        expected = newton_schulz(flat, 5) * 0.2 * math.sqrt(max(flat.shape))
        torch.testing.assert_close(after.reshape(-1, 20), expected)
        assert after.square().mean().sqrt() == pytest.approx(0.2, rel=0.35)  # AdamW's size, whatever the shape
    gated = torch.randn(2, 12, 5, generator=generator)
    assert [part.shape for part in matrices(gated)] == [(12, 5)] * 2 and len(list(matrices(gated[0]))) == 1
    assert flops((2, 5, 4, 20)) == 20**2 * (2 * 24 + 20) + 2 * 8**2 * (2 * 20 + 8)


def test_matrices_are_dealt_out_evenly_and_always_alike() -> None:
    costs = [7, 1, 5, 5, 3, 9, 2, 2]
    for hands in (1, 2, 3, 5, 9):
        taken = deal(costs, hands)
        loads = [sum(cost for cost, hand in zip(costs, taken, strict=True) if hand == h) for h in range(hands)]
        assert sum(loads) == sum(costs) and max(loads) <= math.ceil(sum(costs) / hands) + max(costs)
        assert max(loads) <= 4 / 3 * best(costs, hands)  # Graham 1969
        assert taken == deal(list(costs), hands)
    assert deal([4, 4, 4, 4], 2) == [0, 1, 0, 1]


def best(costs: list[int], hands: int) -> int:
    if hands >= len(costs):
        return max(costs)
    deals = itertools.product(range(hands), repeat=len(costs)) if hands <= 3 else []
    loads = ([sum(c for c, h in zip(costs, d, strict=True) if h == hand) for hand in range(hands)] for d in deals)
    return min((max(load) for load in loads), default=math.ceil(sum(costs) / hands))


def three_steps(mesh: Mesh, cfg: Config) -> tuple[dict, dict]:
    """Weights before and all state after three updates with known gradients, whole on every rank."""
    run = tiny_run(mesh, cfg)
    before = assemble(pieces(run.buffers, {"model": run.optimizer.master}, for_saving=True))
    for step in (1, 2, 3):
        owned = torch.zeros_like(run.optimizer.master)
        for piece in pieces(run.buffers, {"grad": owned}, for_saving=False):
            place = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.tensor.shape, strict=True))
            piece.tensor.copy_(gradient(piece.name, piece.shape, step)[place])
        run.optimizer.step(owned, 0.01, torch.tensor(0.5, dtype=torch.float64))
    run.buffers.wait_params()
    assert torch.equal(
        run.buffers.params, torch.cat([run.buffers.gather_flat(b, run.optimizer.master[b.owned]) for b in run.buffers.buckets])
    )  # fmt: skip
    return before, assemble(pieces(run.buffers, training_state(run.optimizer), for_saving=True))


def muon_config(folder: Path, family: str, tp: int = 1, pp: int = 1, **options: Any) -> Config:
    layout = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "ddp_bucket_size": 50_000,
        "ffn_hidden_size": 204,
    }
    return tiny_config(folder, family, optimizer="muon", weight_decay=0.5, **layout, **options)


def test_an_update_is_that_of_torchs_muon_and_adamw(tmp_path: Path) -> None:
    before, after = three_steps(single_process_mesh(), muon_config(tmp_path, "llama"))
    for key, start in before.items():
        name = key.removeprefix("model.")
        is_hidden = is_hidden_matrix(name, tuple(start.shape))
        assert {k.split(".")[0] for k in after if k.endswith(f".{name}")} == (
            {"model", "momentum"} if is_hidden else {"model", "exp_avg", "exp_avg_sq"}
        )
        parts = list(matrices(start)) if is_hidden else [start]
        made = list(matrices(after[key])) if is_hidden else [after[key]]
        grads = [gradient(f"grad.{name}", tuple(start.shape), step) * 0.5 for step in (1, 2, 3)]
        for i, (part, got) in enumerate(zip(parts, made, strict=True)):
            parameter = torch.nn.Parameter(part.flatten(0, -2).clone() if is_hidden else part.clone())
            oracle: torch.optim.Optimizer
            if is_hidden:
                oracle = torch.optim.Muon(
                    [parameter], lr=0.01, weight_decay=0.5, momentum=0.95, adjust_lr_fn="match_rms_adamw"
                )
            else:
                decay = 0.5 if name in ("embedding.word.weight", "head.weight") else 0.0
                oracle = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), weight_decay=decay)
            for grad in grads:
                grad = list(matrices(grad))[i].flatten(0, -2) if is_hidden else grad
                parameter.grad = grad.clone()
                oracle.step()
            moved, expected = (
                got.reshape(parameter.shape) - part.reshape(parameter.shape),
                parameter.detach() - part.reshape(parameter.shape),
            )
            # torch's products are in bf16, ours on a CPU in fp32.
            bound = 2**-6 if is_hidden else 1e-5
            assert (moved - expected).norm() <= bound * expected.norm(), name


@functools.cache
def alone(folder: Path, family: str) -> dict:
    return three_steps(single_process_mesh(), muon_config(folder, family))[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize(
    ("family", "tp", "pp", "dp", "options"),
    [
        ("llama", 2, 1, 1, {}),
        ("llama", 6, 1, 1, {}),  # three ranks share each of the two key/value heads
        ("gpt2", 1, 1, 3, {}),
        ("llama", 1, 1, 4, {"num_distributed_optimizer_instances": 2}),
        ("gpt_neox", 2, 2, 2, {}),
    ],
)
def test_any_layout_makes_the_update_of_one_process(
    family: str, tp: int, pp: int, dp: int, options: dict[str, int], folder: Path
) -> None:
    cfg, instances = (
        muon_config(folder, family, tp, pp, **options),
        options.get("num_distributed_optimizer_instances", 1),
    )
    _, after = run_ranks(three_steps, cfg, tp=tp, pp=pp, dp=dp, instances=instances, kv=max(tp // 2, 1))[0]
    for name, tensor in alone(folder, family).items():
        assert (after[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def memory(mesh: Mesh, cfg: Config) -> tuple[int, int, int, int]:
    o = tiny_run(mesh, cfg).optimizer
    return len(o.master), len(o.exp_avg.flat), len(o.exp_avg_sq.flat), len(o.momentum.flat)


def test_a_matrix_has_one_state_and_the_rest_two(tmp_path: Path) -> None:
    for of_rank in run_ranks(memory, muon_config(tmp_path, "gpt2"), dp=3):
        shard, first, second, momentum = of_rank
        assert first == second and first + momentum == shard
    shard, first, _, momentum = memory(single_process_mesh(), muon_config(tmp_path, "gpt2"))
    hidden = 3 * 144 * (2 * (3 + 2) * 24 + 144 + 2 * 204)  # qkv, output, up and down of three layers
    assert hidden <= momentum < hidden + 64 and 1003 * 144 < first < hidden


def train_with_frozen(mesh: Mesh, cfg: Config) -> None:
    run = tiny_run(mesh, cfg)
    frozen = next(s for s in run.buffers.segments if s.name == "layers.1.mlp.up.weight")
    frozen.parameter.requires_grad_(False)
    optimizer = type(run.optimizer)(run.buffers, run.optimizer.rules)
    before = optimizer.master.clone()
    optimizer.step(torch.randn(optimizer.master.shape), 0.1)
    moved = optimizer.master != before
    assert not moved[slice(*frozen.owned)].any() and not optimizer.momentum.of(frozen).any()
    assert moved[slice(*next(s for s in run.buffers.segments if s.name == "layers.0.mlp.up.weight").owned)].all()


def test_a_frozen_matrix_keeps_its_bits(tmp_path: Path) -> None:
    run_ranks(train_with_frozen, muon_config(tmp_path, "gpt2"), dp=2)
