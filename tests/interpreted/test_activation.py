"""The activation kernels against float64 formulas: outputs and the gradients of input and bias."""

import math

import pytest
import torch
from comparison import DTYPES, close, gradients, random
from megapoly_kernels import activation, bias_gelu, gated_activation
from torch import Tensor

KINDS = ["tanh", "none", "swiglu", "geglu"]


def activated(z: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        return z / (1 + torch.exp(-z))
    if kind == "tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def formula(kind: str, x: Tensor, bias: Tensor | None) -> Tensor:
    z = x if bias is None else x + bias
    return activated(z, kind) if z.dim() == 2 else activated(z[:, 0], kind) * z[:, 1]


def kernel(kind: str, x: Tensor, bias: Tensor | None) -> Tensor:
    operation = bias_gelu if kind in ("tanh", "none") else gated_activation
    return operation(x, bias, kind, backend="triton")


def compare(kind: str, x: Tensor, bias: Tensor | None, roundings: float = 1) -> None:
    """Outputs and gradients within one rounding of their type, or 8 of fp32; sums too, since they are taken in fp32."""
    inputs = [x] if bias is None else [x, bias]
    wide = [tensor.double() for tensor in inputs]

    def run(*leaves: Tensor) -> list[Tensor]:
        return [kernel(kind, leaves[0], leaves[1] if len(leaves) > 1 else None)]

    def expect(*leaves: Tensor) -> list[Tensor]:
        return [formula(kind, leaves[0], leaves[1] if len(leaves) > 1 else None)]

    got, got_gradients = gradients(run, inputs)
    expected, expected_gradients = gradients(expect, wide)
    assert [tensor.dtype for tensor in got + got_gradients] == [x.dtype] * (len(inputs) + 1)
    for a, b in zip(got + got_gradients, expected + expected_gradients, strict=True):
        close(a, b, roundings, 8 * roundings)


def shape_of(kind: str, tokens: int, ffn: int) -> tuple[int, ...]:
    return (tokens, ffn) if kind in ("tanh", "none") else (tokens, 2, ffn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind: str, has_bias: bool, dtype: torch.dtype) -> None:
    for tokens, ffn in ((5, 33), (37, 80), (1, 272)):
        x = random(*shape_of(kind, tokens, ffn), seed=1, dtype=dtype, scale=2)
        bias = random(*x.shape[1:], seed=2, dtype=dtype) if has_bias else None
        compare(kind, x, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_each_program_sums_the_bias_gradient_over_several_tiles(kind: str) -> None:
    x = random(*shape_of(kind, 115, 300), seed=3)
    bias = random(*x.shape[1:], seed=4)
    compare(kind, x, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_input_and_gradient_may_be_strided(kind: str) -> None:
    shape = shape_of(kind, 9, 48)
    wide = random(*shape[:-1], 2 * shape[-1], seed=5)
    bias = random(*shape[1:], seed=6)
    upstream = random(9, 3 * shape[-1], seed=7)[:, shape[-1] : 2 * shape[-1]]
    for x in (random(18, *shape[1:], seed=8)[1::2], wide[..., ::2]):
        leaf, exact = x.detach().requires_grad_(), x.double().requires_grad_()
        got, expected = kernel(kind, leaf, bias), formula(kind, exact, bias.double())
        close(got, expected, fp32_roundings=8)
        for gradient in (upstream, upstream[:1].expand(9, -1)):
            a = torch.autograd.grad(got, leaf, gradient, retain_graph=True)[0]
            b = torch.autograd.grad(expected, exact, gradient.double(), retain_graph=True)[0]
            close(a, b, fp32_roundings=8)


@pytest.mark.parametrize("kind", KINDS)
def test_large_values_neither_overflow_nor_lose_their_slope(kind: str) -> None:
    values = torch.tensor([50.0, 1e4, 1e15, 3e30])
    z = torch.cat([-values.flip(0), values])[None]
    x = (z if kind in ("tanh", "none") else torch.stack([z, torch.ones_like(z)], 1)).requires_grad_()
    y = kernel(kind, x, None)
    expected = z.clamp(min=0)
    gradient = torch.autograd.grad(y, x, torch.ones_like(y))[0].view(-1, 8)
    assert torch.equal(y.detach().where(expected > 0, 0.0), expected)
    assert y.detach().where(expected == 0, 0.0).abs().max() <= 1e-18  # silu(-50) = -1e-20
    close(gradient[:1], (z > 0).float(), fp32_roundings=1)
    if kind in ("swiglu", "geglu"):
        close(gradient[1:], expected, fp32_roundings=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_as_near_as_fp32_allows(kind: str) -> None:
    z = torch.linspace(-12, 12, 1537)[None]
    x = (z if kind in ("tanh", "none") else torch.stack([z, torch.ones_like(z)], 1)).requires_grad_()
    exact = z.double().requires_grad_()
    expected = activated(exact, kind)
    y = kernel(kind, x, None)
    slope = torch.autograd.grad(y, x, torch.ones_like(y))[0].view(-1, 1537)[:1]
    eps = torch.finfo(torch.float32).eps
    assert ((y.double() - expected).abs() <= 2 * eps * exact.abs().clamp(min=1e-3)).all()
    # u' is 18 at z = 5 and multiplies the rounding of 1 - gate.
    assert ((slope.double() - torch.autograd.grad(expected.sum(), exact)[0]).abs() <= 32 * eps).all()
    # The negative tail, where a sum of one and erf keeps no digit, holds more than bf16 does.
    tail = (z > -5) & (z < -1e-3)
    assert ((y.double() / expected - 1).abs()[tail] <= torch.finfo(torch.bfloat16).eps / 16).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str) -> None:
    x = torch.empty(shape_of(kind, 0, 40)).requires_grad_()
    bias = random(*x.shape[1:], seed=1).requires_grad_()
    y = kernel(kind, x, bias)
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.empty_like(y))
    assert y.shape == (0, 40) and dx.shape == x.shape and torch.equal(dbias, torch.zeros_like(bias))


def test_the_bias_gradient_is_the_same_every_time_and_costs_nothing_without_a_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, bias = random(37, 80, seed=1, dtype=torch.bfloat16), random(80, seed=2, dtype=torch.bfloat16)
    first, second = (torch.ops.megapoly.bias_gelu_backward(x, x, bias, "tanh") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    monkeypatch.setattr(activation, "sum_partials", None)
    assert torch.ops.megapoly.bias_gelu_backward(x, x, None, "tanh")[1].numel() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_inputs_are_kept_for_backward(kind: str) -> None:
    x = random(*shape_of(kind, 5, 32), seed=1).requires_grad_()
    bias = random(*x.shape[1:], seed=2).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel(kind, x, bias)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), bias.data_ptr()}


@pytest.mark.parametrize("name", ["bias_gelu", "gated_activation"])
def test_shapes_without_running_match(name: str) -> None:
    kind = "tanh" if name == "bias_gelu" else "swiglu"
    x = random(*shape_of(kind, 5, 33), seed=1)
    for bias in (random(*x.shape[1:], seed=2), None):
        forward, backward = getattr(torch.ops.megapoly, name), getattr(torch.ops.megapoly, name + "_backward")
        torch.library.opcheck(forward, (x, bias, kind), test_utils=("test_schema", "test_faketensor"))
        dy = random(5, 33, seed=3)
        torch.library.opcheck(backward, (dy, x, bias, kind), test_utils=("test_schema", "test_faketensor"))
