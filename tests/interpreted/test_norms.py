"""LayerNorm and RMSNorm with the residual add: interpreted kernels against float64 formulas."""

from collections.abc import Callable, Sequence

import pytest
import torch
from comparison import DTYPES, close, gradients, random
from megapoly_kernels import layer_norm, norm_kernels, rms_norm
from megapoly_kernels.norm_kernels import norm_backward, norm_forward
from torch import Tensor

EPS = 0.05  # beside a variance near 1, so that its place shows
# Type of the residual stream, type of all else: PolyLM keeps the stream in fp32 beside bf16 weights.
TYPES = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16)]
# (rows, width, has a branch): one row, part of a tile's rows, tiles of many programs.
SHAPES = [(1, 33, True), (5, 200, False), (37, 80, True), (37, 1000, True)]
TILES = ["whole rows", "columns"]

Operation = Callable[..., Sequence[Tensor]]


@pytest.fixture
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For "columns", rows that are wider than the widest tile without the 8193 columns that this takes."""
    if request.param == "columns":
        monkeypatch.setattr(norm_kernels, "WIDEST_TILE", 32)
        monkeypatch.setattr(norm_kernels, "WIDE_TILE", 64)
        monkeypatch.setattr(norm_kernels, "PARAMETER_COLUMNS", 32)


def kernel(kind: str, has_branch: bool) -> Operation:
    """The public function of (branch, residual, weight[, bias])."""

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        branch, rest = (inputs[0], inputs[1:]) if has_branch else (None, inputs)
        return (layer_norm if kind == "layer" else rms_norm)(branch, *rest, EPS, backend="triton")

    return run


def formula(kind: str, has_branch: bool, stream: torch.dtype) -> Operation:
    """The same in float64, but for the rounding of the new residual, whose derivative is one."""

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        x, weight = inputs[has_branch], inputs[has_branch + 1]
        if has_branch:
            x = x + inputs[0]
            x = x + (x.to(stream).double() - x).detach()
        centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        return (normed + inputs[-1] if kind == "layer" else normed), x

    return run


def inputs_of(kind: str, has_branch: bool, rows: int, width: int, stream: torch.dtype, other: torch.dtype) -> list:
    residual = random(rows, width, seed=1, dtype=stream) + 0.5
    parameters = [random(width, seed=i, dtype=other) for i in ((2, 3) if kind == "layer" else (2,))]
    return ([random(rows, width, seed=4, dtype=other)] if has_branch else []) + [residual, *parameters]


def compare(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        close(a, b, roundings=1, fp32_roundings=4)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("stream", "other"), TYPES)
@pytest.mark.parametrize(("rows", "width", "has_branch"), SHAPES)
def test_outputs_and_all_gradients(
    kind: str, stream: torch.dtype, other: torch.dtype, rows: int, width: int, has_branch: bool
) -> None:
    inputs = inputs_of(kind, has_branch, rows, width, stream, other)
    outputs, grads = gradients(kernel(kind, has_branch), inputs)
    wide_outputs, wide_grads = gradients(formula(kind, has_branch, stream), [x.double() for x in inputs])
    assert [x.dtype for x in outputs] == [other, stream]
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]
    compare(outputs, wide_outputs)
    compare(grads, wide_grads)


# Columns: 33 = a tile of half its columns; 112 = one and three quarters; parameters' rows by one program, by two.
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("stream", "other"), TYPES)
@pytest.mark.parametrize(("rows", "width", "has_branch"), [(2, 33, False), (37, 112, True), (19, 200, True)])
@pytest.mark.parametrize("tiles", ["columns"], indirect=True)
def test_rows_wider_than_a_tile(
    tiles: None, kind: str, stream: torch.dtype, other: torch.dtype, rows: int, width: int, has_branch: bool
) -> None:
    test_outputs_and_all_gradients(kind, stream, other, rows, width, has_branch)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_row_of_more_than_8192(kind: str) -> None:
    test_outputs_and_all_gradients(kind, torch.float32, torch.bfloat16, 2, 8200, True)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize("tiles", TILES, indirect=True)
def test_one_output_without_a_gradient(tiles: None, kind: str, has_branch: bool) -> None:
    width = 48
    types = (torch.float32, torch.bfloat16)
    inputs = inputs_of(kind, has_branch, 5, width, *types)
    wide = [x.double() for x in inputs]
    run, run64 = kernel(kind, has_branch), formula(kind, has_branch, types[0])
    compare(gradients(lambda *x: run(*x)[:1], inputs)[1], gradients(lambda *x: run64(*x)[:1], wide)[1])
    streams = inputs[: has_branch + 1]
    _, grads = gradients(lambda *x: run(*x, *inputs[has_branch + 1 :])[1:], streams)
    upstream = random(5, width, seed=77, dtype=torch.bfloat16)
    assert all(torch.equal(grad, upstream.to(x.dtype)) for grad, x in zip(grads, streams, strict=True))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("tiles", TILES, indirect=True)
def test_strided_inputs_and_gradients(tiles: None, kind: str) -> None:
    width = 40
    branch, residual, *parameters = inputs_of(kind, True, 5, width, torch.float32, torch.float32)
    columns = torch.cat([branch, residual], 1).requires_grad_()  # rows that do not follow each other
    transposed = residual.T.contiguous().requires_grad_()
    leaves = [columns, transposed, *(p.requires_grad_() for p in parameters)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for operation, (joint, turned, *rest) in (
        (kernel(kind, True), leaves),
        (formula(kind, True, torch.float64), wide),
    ):
        first = operation(joint[:, :width], joint[:, width:], *rest)
        second = operation(joint[:, :width], turned.T, *rest)
        upstream = [
            random(5, 2 * width, seed=7)[:, ::2],
            random(5, 2 * width, seed=8)[:, :width],
            torch.ones(()).expand(5, width),
            random(width, 5, seed=9).T,
        ]
        tensors = [joint, turned, *rest]
        grads = torch.autograd.grad([*first, *second], tensors, [u.to(first[0].dtype) for u in upstream])
        results.append([*first, *second, *grads])
    compare(results[0], results[1])


@pytest.mark.parametrize("width", [200, 1000, 8200])
def test_the_variance_survives_a_large_mean(width: int) -> None:
    """The mean of squares less the square of the mean would be off by 1e-3 here."""
    x, weight, bias = random(3, width, seed=1) * 10 + 1000, torch.ones(width), torch.zeros(width)
    expected = (x.double() - x.double().mean(-1, keepdim=True)) / x.double().var(-1, correction=0, keepdim=True).sqrt()
    close(layer_norm(None, x, weight, bias, 1e-12, backend="triton")[0], expected, fp32_roundings=200)


@pytest.mark.parametrize("tiles", TILES, indirect=True)
def test_rms_norm_rounds_before_the_weight(tiles: None) -> None:
    """A single row, so that the weight's gradient shows the rounded factor as well."""
    inputs = inputs_of("rms", True, 1, 200, torch.bfloat16, torch.bfloat16)
    ours, reference = (
        gradients(lambda *x, backend=backend: rms_norm(*x, EPS, backend=backend), inputs)
        for backend in ("triton", "torch")
    )
    for a, b in ((ours[0][0], reference[0][0]), (ours[0][1], reference[0][1]), (ours[1][2], reference[1][2])):
        assert (a != b).double().mean().item() < 0.02


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("tiles", TILES, indirect=True)
def test_no_rows(tiles: None, kind: str) -> None:
    outputs, grads = gradients(kernel(kind, True), inputs_of(kind, True, 0, 48, torch.float32, torch.bfloat16))
    assert [len(x) for x in outputs] == [0, 0]
    assert [len(x) for x in grads[:2]] == [0, 0]
    assert all((grad == 0).all() for grad in grads[2:])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_branch", [True, False])
def test_shapes_without_values(has_bias: bool, has_branch: bool) -> None:
    """What torch.compile is told of the operations is what they return."""
    residual, weight = random(3, 16, seed=1), random(16, seed=2, dtype=torch.bfloat16)
    branch = random(3, 16, seed=3, dtype=torch.bfloat16) if has_branch else None
    checks = ("test_schema", "test_faketensor")
    arguments = (branch, residual, weight, weight if has_bias else None, EPS)
    torch.library.opcheck(norm_forward, arguments, test_utils=checks)
    normed, _, statistics = norm_forward(*arguments)
    dtype = torch.bfloat16 if has_branch else None
    torch.library.opcheck(norm_backward, (normed, None, residual, statistics, weight, dtype), test_utils=checks)
