"""The rotary kernel against complex multiplication in float64: outputs and gradients."""

from dataclasses import dataclass

import pytest
import torch
from comparison import DTYPES, close, gradients, random
from megapoly_kernels import rotary, rotary_table
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """What is rotated: of every `period` of `heads` the first `rotated`, and of head_dim the first rotary_dim."""

    heads: int
    head_dim: int
    rotary_dim: int
    period: int = 1
    rotated: int = 1


CASES = [
    Heads(3, 64, 64, 3, 2),
    Heads(6, 128, 32, 3, 2),
    Heads(5, 80, 80, 5, 4),
    Heads(8, 96, 24),
    Heads(7, 33, 14),
    Heads(1, 256, 64),
]


def formula(x: Tensor, cos: Tensor, sin: Tensor, position_T: Tensor, case: Heads, interleaved: bool) -> Tensor:
    half = case.rotary_dim // 2
    turn = torch.complex(cos[position_T.long()], sin[position_T.long()]).to(torch.complex128)
    heads = []
    for head, x_TK in enumerate(x.unbind(1)):
        if head % case.period >= case.rotated:
            heads.append(x_TK)
            continue
        of_pair = slice(0, case.rotary_dim, 2) if interleaved else slice(0, half)
        partner = slice(1, case.rotary_dim, 2) if interleaved else slice(half, case.rotary_dim)
        turned = torch.complex(x_TK[:, of_pair], x_TK[:, partner]) * turn
        out = x_TK.clone()
        out[:, of_pair], out[:, partner] = turned.real, turned.imag
        heads.append(out)
    return torch.stack(heads, 1)


def positions(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(3)).to(dtype)


def compare(x: Tensor, case: Heads, interleaved: bool, position_T: Tensor) -> None:
    cos, sin = rotary_table(50, case.rotary_dim, 10000.0)
    options = {"interleaved": interleaved, "period": case.period, "rotated": case.rotated}
    got = gradients(lambda leaf: [rotary(leaf, cos, sin, position_T, **options, backend="triton")], [x])
    expected = gradients(
        lambda leaf: [formula(leaf, cos.double(), sin.double(), position_T, case, interleaved)], [x.double()]
    )
    for (a,), (b,) in zip(got, expected, strict=True):
        assert a.dtype == x.dtype
        close(a, b, roundings=1, fp32_roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: Heads, interleaved: bool, dtype: torch.dtype) -> None:
    for tokens, kind in ((1, torch.int64), (5, torch.int32), (37, torch.int64)):
        compare(
            random(tokens, case.heads, case.head_dim, seed=1, dtype=dtype), case, interleaved, positions(tokens, kind)
        )


@pytest.mark.parametrize("interleaved", [False, True])
def test_more_blocks_of_tokens_than_programs_wanted(interleaved: bool) -> None:
    """Each program then walks over several tiles of heads."""
    case = Heads(9, 1024, 8, 3, 1)
    compare(random(150, 9, 1024, seed=2), case, interleaved, positions(150, torch.int32))


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_not_rotated_passes_through_as_it_is(interleaved: bool) -> None:
    cos, sin = rotary_table(50, 12, 10000.0)
    x = random(9, 6, 20, seed=1)
    x[:, 2::3], x[..., 12:] = torch.inf, torch.inf
    out = rotary(x, cos, sin, positions(9, torch.int32), interleaved=interleaved, period=3, rotated=2, backend="triton")
    assert torch.equal(out[:, 2::3], x[:, 2::3]) and torch.equal(out[..., 12:], x[..., 12:])
    assert torch.isfinite(out[:, [0, 1, 3, 4], :12]).all()
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("interleaved", [False, True])
def test_input_gradient_and_table_may_be_strided(interleaved: bool) -> None:
    case, position_T = Heads(6, 16, 16, 3, 2), positions(18, torch.int64)[::2]
    cos, sin = (x.repeat_interleave(2, 1)[:, ::2] for x in rotary_table(50, 16, 10000.0))
    packed = random(9, 12, 32, seed=4)
    upstream = random(9, 12, 16, seed=5)[:, ::2]
    for x in (packed[:, 3:9, 16:], packed[:, ::2, ::2], random(6, 9, 16, seed=6).transpose(0, 1)):
        leaf, wide = x.detach().requires_grad_(), x.double().requires_grad_()
        got = rotary(leaf, cos, sin, position_T, interleaved=interleaved, period=3, rotated=2, backend="triton")
        expected = formula(wide, cos.double(), sin.double(), position_T, case, interleaved)
        close(got, expected, fp32_roundings=2)
        for gradient in (
            upstream,
            upstream[:1].expand(9, 6, 16),
            upstream.transpose(0, 2).contiguous().transpose(0, 2),
        ):
            a = torch.autograd.grad(got, leaf, gradient, retain_graph=True)[0]
            b = torch.autograd.grad(expected, wide, gradient.double(), retain_graph=True)[0]
            close(a, b, fp32_roundings=2)


def test_backward_turns_forward_around() -> None:
    cos, sin = rotary_table(50, 64, 10000.0)
    x, position_T = random(37, 4, 64, seed=1).requires_grad_(), positions(37, torch.int32)
    out = rotary(x, cos, sin, position_T, backend="triton")
    close(torch.autograd.grad(out, x, out.detach())[0], x.detach().double(), fp32_roundings=4)


def test_no_tokens_and_no_gradient_for_the_table() -> None:
    cos, sin = (table.requires_grad_() for table in rotary_table(50, 16, 10000.0))
    x = torch.empty(0, 3, 16, requires_grad=True)
    out = rotary(x, cos, sin, torch.empty(0, dtype=torch.int64), backend="triton")
    gradient = torch.autograd.grad(out, (x, cos, sin), out.detach(), allow_unused=True)
    assert out.shape == x.shape and gradient[0].shape == x.shape and gradient[1] is None and gradient[2] is None


def test_shapes_without_running_match() -> None:
    cos, sin = rotary_table(50, 16, 10000.0)
    arguments = (random(5, 3, 24, seed=1), cos, sin, positions(5, torch.int32), False, 3, 2, True)
    torch.library.opcheck(torch.ops.megapoly.rotary, arguments, test_utils=("test_schema", "test_faketensor"))
