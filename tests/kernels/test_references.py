"""The plain references against independent float64 formulas, outputs and gradients."""

import math

import pytest
import torch
from megapoly_kernels import (
    adamw_,
    bias_gelu,
    gated_activation,
    layer_norm,
    rms_norm,
    rotary,
    rotary_attention,
    rotary_table,
    vocab_parallel_cross_entropy,
)
from ranks import run_ranks
from torch import Tensor

from megapoly.parallel.mesh import Mesh

EPS32 = torch.finfo(torch.float32).eps


def close(actual: Tensor, expected: Tensor, factor: float = 64) -> None:
    """Equal within `factor` roundings of the largest entry."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=factor * EPS32 * max(expected.abs().max().item(), 1e-3)
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    total = sum((output * random(*output.shape, seed=9).to(output.dtype)).sum() for output in outputs)
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("has_branch", [True, False])
def test_norm_with_residual_add(kind: str, has_branch: bool) -> None:
    leaves = [random(7, 33, seed=i).requires_grad_() for i in (1, 2)] + [
        random(33, seed=i).requires_grad_() for i in (3, 4)
    ]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    branch, residual, weight, bias = leaves
    if kind == "layer":
        got = layer_norm(branch if has_branch else None, residual, weight, bias, 1e-5)
    else:
        got = rms_norm(branch if has_branch else None, residual, weight, 1e-5)
    stream = wide[1] + wide[0] if has_branch else wide[1]
    centred = stream - stream.mean(-1, keepdim=True) if kind == "layer" else stream
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * wide[2]
    expected = expected + wide[3] if kind == "layer" else expected
    used = [i for i in range(4) if (i != 0 or has_branch) and (i != 3 or kind == "layer")]
    for a, b in zip(got, (expected, stream), strict=True):
        close(a, b)
    for a, b in zip(
        gradients(got, [leaves[i] for i in used]), gradients((expected, stream), [wide[i] for i in used]), strict=True
    ):
        close(a, b)


def test_norms_keep_an_fp32_stream_beside_bf16_weights() -> None:
    weight = torch.ones(16, dtype=torch.bfloat16)
    for normed, stream in (
        layer_norm(random(3, 16).bfloat16(), random(3, 16), weight, weight, 1e-5),
        rms_norm(random(3, 16).bfloat16(), random(3, 16), weight, 1e-5),
    ):
        assert normed.dtype == torch.bfloat16 and stream.dtype == torch.float32


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (256, 64), (24, 12)])
def test_rotary_turns_pairs_by_their_angle(head_dim: int, rotary_dim: int) -> None:
    x = random(2, 9, 3, head_dim)
    cos, sin = rotary_table(16, rotary_dim, 10000.0)
    got, half = rotary(x, cos, sin), rotary_dim // 2
    for position in (0, 1, 8):
        for i in (0, half - 1):
            angle = position * 10000.0 ** (-2 * i / rotary_dim)
            pair = torch.complex(x[:, position, :, i].double(), x[:, position, :, i + half].double())
            turned = pair * complex(math.cos(angle), math.sin(angle))
            close(got[:, position, :, i], turned.real)
            close(got[:, position, :, i + half], turned.imag)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize(("heads", "groups", "rotary_dim"), [(6, 6, 0), (6, 2, 24), (6, 1, 12)])
def test_attention_is_causal_softmax_with_grouped_keys(heads: int, groups: int, rotary_dim: int) -> None:
    leaves = [random(2, 11, n, 24, seed=s).requires_grad_() for n, s in ((heads, 1), (groups, 2), (groups, 3))]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    table = rotary_table(11, rotary_dim, 10000.0) if rotary_dim else (None, None)
    got = rotary_attention(*leaves, *table)
    q, k, v = wide
    if rotary_dim:
        cos, sin = (t.double()[None, :, None] for t in table)
        half = rotary_dim // 2

        def turn(x: Tensor) -> Tensor:
            a, b, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

        q, k = turn(q), turn(k)
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        scores = torch.einsum("bqd,bkd->bqk", q[:, :, head], k[:, :, group]) / math.sqrt(24)
        scores = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v[:, :, group])
    expected = torch.stack(outputs, 2)
    close(got, expected)
    for a, b in zip(gradients((got,), leaves), gradients((expected,), wide), strict=True):
        close(a, b)


def test_gelu_and_gates() -> None:
    x, bias = random(5, 14).requires_grad_(), random(14, seed=1).requires_grad_()
    z = x.detach().double() + bias.detach().double()
    close(bias_gelu(x, bias, "none"), 0.5 * z * (1 + torch.erf(z / math.sqrt(2))))
    close(bias_gelu(x, bias, "tanh"), 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))))
    gate, linear = z.view(5, 2, 7).unbind(1)
    got = gated_activation(x.view(5, 2, 7), bias.view(2, 7), "swiglu")
    close(got, gate * torch.sigmoid(gate) * linear)
    close(
        gated_activation(x.view(5, 2, 7), bias.view(2, 7), "geglu"),
        0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * linear,
    )


def shard_loss(mesh: Mesh, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of this rank's columns: 1003 entries in shards of 512 rows, the rest padding."""
    rows = 512 if mesh.tp.size == 2 else 1024
    begin = mesh.tp.rank * rows
    valid = min(rows, 1003 - begin)
    mine = torch.full((len(logits), rows), 50.0)  # padding that would win if it counted
    mine[:, :valid] = logits[:, begin : begin + valid]
    mine.requires_grad_()
    losses = vocab_parallel_cross_entropy(mine, labels, begin, valid, mesh.tp.group)
    (losses * weight).sum().backward()
    assert mine.grad is not None and (mine.grad[:, valid:] == 0).all()
    return losses.detach(), mine.grad[:, :valid]


@pytest.mark.parametrize("tp", [1, 2])
def test_cross_entropy_over_shards(tp: int) -> None:
    logits = random(13, 1003) * 8
    labels = torch.randint(0, 1003, (13,), generator=torch.Generator().manual_seed(1))
    labels[:2] = torch.tensor([0, 1002])
    weight = random(13, seed=2)
    wide = logits.double().requires_grad_()
    expected = wide.logsumexp(-1) - wide.gather(-1, labels[:, None])[:, 0]
    (expected * weight).sum().backward()
    parts = run_ranks(shard_loss, logits, labels, weight, tp=tp)
    for losses, _ in parts:
        close(losses, expected)
    assert wide.grad is not None
    close(torch.cat([gradient for _, gradient in parts], -1), wide.grad)


def loss_of_three_entries(mesh: Mesh) -> Tensor:
    """Two ranks of four rows each: the second holds nothing but padding."""
    logits = torch.full((1, 4), 7.0)
    if mesh.tp.is_first:
        logits[0, :3] = torch.tensor([1e4, -1e4, 0.0])
    return vocab_parallel_cross_entropy(
        logits, torch.tensor([1]), min(mesh.tp.rank * 4, 3), 3 if mesh.tp.is_first else 0, mesh.tp.group
    )


def test_cross_entropy_survives_large_logits_and_a_shard_of_padding() -> None:
    for loss in run_ranks(loss_of_three_entries, tp=2):
        assert loss.item() == pytest.approx(2e4)


def test_adamw_follows_the_paper() -> None:
    master, exp_avg, exp_avg_sq = random(50), torch.zeros(50), torch.zeros(50)
    x, m, v = master.double(), torch.zeros(50).double(), torch.zeros(50).double()
    for step in range(1, 6):
        grad = random(50, seed=step)
        adamw_(master, grad, exp_avg, exp_avg_sq, step, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        x = x * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    close(master, x)
    close(exp_avg, m)
    close(exp_avg_sq, v)
