"""The plain references against independent float64 formulas, outputs and gradients."""

import math
from dataclasses import dataclass

import pytest
import torch
from megapoly_kernels import (
    HeadShape,
    Range,
    RangeTable,
    Sequences,
    adamw_,
    bias_gelu,
    gated_activation,
    layer_norm,
    merged,
    rms_norm,
    rotary,
    rotary_attention,
    rotary_table,
    squared_norm,
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
    x, half = random(9, 6, head_dim), rotary_dim // 2
    cos, sin = rotary_table(16, rotary_dim, 10000.0)
    position_T = torch.tensor([0, 1, 2, 3, 0, 1, 15, 7, 8])
    for interleaved in (False, True):
        got = rotary(x, cos, sin, position_T, interleaved=interleaved, period=3, rotated=2)
        for token, position in enumerate(position_T.tolist()):
            for i in (0, half - 1):
                a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                angle = position * 10000.0 ** (-2 * i / rotary_dim)
                pair = torch.complex(x[token, :, a].double(), x[token, :, b].double())
                turned = pair * complex(math.cos(angle), math.sin(angle))
                for head in (0, 1, 3, 4):
                    close(got[token, head, a], turned.real[head])
                    close(got[token, head, b], turned.imag[head])
        assert torch.equal(got[:, [2, 5]], x[:, [2, 5]])
        assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@dataclass(frozen=True)
class Looks:
    """A case of attention: which tokens may be seen, and how they are weighed."""

    rotary_dim: int = 0
    interleaved: bool = False
    lengths: tuple[int, ...] = (11, 11)
    window: int | None = None
    alibi: bool = False


@pytest.mark.parametrize(
    "case",
    [
        Looks(),
        Looks(rotary_dim=24),
        Looks(rotary_dim=12, interleaved=True),
        Looks(rotary_dim=12, lengths=(3, 1, 14, 4)),
        Looks(window=4),
        Looks(window=3, lengths=(9, 13), alibi=True),
    ],
)
@pytest.mark.parametrize(("groups", "queries"), [(6, 1), (2, 3), (1, 4)])
def test_attention_is_causal_softmax_with_grouped_keys(groups: int, queries: int, case: Looks) -> None:
    shape, tokens = HeadShape(groups, queries, 24), sum(case.lengths)
    qkv = random(tokens, groups * (queries + 2) * 24).requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    is_packed = len(set(case.lengths)) > 1
    borders = torch.tensor([0, *case.lengths]).cumsum(0)
    sequences = Sequences.packed(borders, tokens) if is_packed else Sequences(case.lengths[0])
    cos, sin = rotary_table(24, case.rotary_dim, 10000.0) if case.rotary_dim else (None, None)
    slopes = 2.0 ** -torch.arange(1, groups * queries + 1) if case.alibi else None
    got = rotary_attention(
        qkv, shape, sequences, cos, sin, interleaved=case.interleaved, window=case.window, alibi_slopes_h=slopes
    )
    expected = []
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        q, k, v = shape.split(wide[begin:end])
        if cos is not None and sin is not None:
            position = torch.arange(end - begin)
            q, k = (rotary(x, cos.double(), sin.double(), position, interleaved=case.interleaved) for x in (q, k))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)[None]
        is_hidden = (distance < 0) | (distance >= (case.window or tokens))
        heads = []
        for head in range(groups * queries):
            scores = q[:, head] @ k[:, head // queries].T / math.sqrt(24)
            scores = scores - (0 if slopes is None else slopes[head].double()) * distance
            heads.append(scores.masked_fill(is_hidden, -torch.inf).softmax(-1) @ v[:, head // queries])
        expected.append(torch.stack(heads, 1))
    close(got, torch.cat(expected))
    for a, b in zip(gradients((got,), [qkv]), gradients((torch.cat(expected),), [wide]), strict=True):
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


def test_adamw_follows_the_paper_within_its_ranges() -> None:
    master, exp_avg, exp_avg_sq = random(50), torch.zeros(50), torch.zeros(50)
    params, before = master.bfloat16(), master.clone()
    x, m, v = master.double(), torch.zeros(50).double(), torch.zeros(50).double()
    ranges = RangeTable.build([Range(0, 20, 0.1, 0.3), Range(20, 20, 0.5), Range(27, 50)], torch.device("cpu"))
    decay, rate = torch.zeros(50).double(), torch.ones(50).double()
    decay[:20], rate[:20] = 0.1, 0.3
    for step in range(1, 6):
        grad = random(50, seed=step)
        g = grad.double() * 0.5
        adamw_(
            master, grad, exp_avg, exp_avg_sq, step, ranges, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8,
            scale=torch.tensor(0.5), params=params,
        )  # fmt: skip
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        x = x * (1 - 0.01 * rate * decay)
        x -= 0.01 * rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    for part in (slice(0, 20), slice(27, 50)):
        close(master[part], x[part])
        close(exp_avg[part], m[part])
        close(exp_avg_sq[part], v[part])
    assert torch.equal(master[20:27], before[20:27]) and not exp_avg[20:27].any() and not exp_avg_sq[20:27].any()
    assert torch.equal(params, master.bfloat16())


def test_adamw_with_a_scale_of_nan_changes_nothing() -> None:
    state = [random(50, seed=seed).abs() for seed in range(3)]
    params, before = state[0].bfloat16(), [x.clone() for x in state]
    table = RangeTable.build([Range(0, 20, 0.1, 0.3), Range(27, 50)], torch.device("cpu"))
    adamw_(
        state[0], random(50), state[1], state[2], 3, table, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8,
        scale=torch.tensor(torch.nan, dtype=torch.float64), params=params,
    )  # fmt: skip
    assert all(map(torch.equal, state, before)) and torch.equal(params, before[0].bfloat16())


def test_squared_norm_of_ranges() -> None:
    x = random(50)
    table = RangeTable.build([Range(0, 7), Range(7, 7), Range(9, 50)], torch.device("cpu"))
    total = squared_norm(x, table)
    assert total.dtype == torch.float64
    close(total, x.double().square().sum() - x[7:9].double().square().sum())
    assert squared_norm(x, RangeTable.build([], torch.device("cpu"))).item() == 0.0


def test_ranges_merge_where_they_touch_and_decay_alike() -> None:
    ranges = [Range(0, 2, 0.1), Range(2, 2, 0.3), Range(2, 5, 0.1), Range(5, 6), Range(7, 9), Range(9, 9)]
    assert merged(ranges) == [Range(0, 5, 0.1), Range(5, 6), Range(7, 9)]
    assert merged([Range(0, 2), Range(2, 4, 0.0, 0.5), Range(4, 5, 0.0, 0.5)]) == [Range(0, 2), Range(2, 5, 0.0, 0.5)]
