"""Activations of the MLP: GELU with its bias (Hendrycks and Gimpel 2016), SwiGLU and GeGLU (Shazeer 2020).

The kernels keep only their inputs for backward and compute everything else again. The gradient of the bias is summed
in the same pass that writes the gradient of the input.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megapoly_kernels.launch import resolve_backend, sum_partials, target_of

_ACTIVATION = {"tanh": "gelu_tanh", "none": "gelu_erf", "swiglu": "silu", "geglu": "gelu_erf"}
_COLUMNS = 256


@triton.jit
def _normal_cdf(z):
    # Phi(-|z|) = 2^P(|z|). P is a minimax fit of log2 Phi(-z) on [0, 5.5], weighted by max(Phi(-z), 0.001): Phi is off
    # by 1e-7 at most, as with erf in fp32, and by 6e-5 of itself down to z = -5. P falls on, so that no range needs
    # care. The library's erf branches for each element, which makes a pass over memory twice as long as its traffic.
    a = tl.abs(z)
    power = -8.16833279e-07 * a + 1.41190195e-05
    power = power * a - 6.25545002e-05
    power = power * a - 0.000438326591
    power = power * a + 0.00745128891
    power = power * a - 0.0527538372
    power = power * a - 0.459128377
    power = power * a - 1.15111418
    tail = tl.exp2(power * a - 0.999999834)
    return tl.where(z > 0, 1.0 - tail, tail)


@triton.jit
def _activate(z, KIND: tl.constexpr):
    if KIND == "gelu_erf":
        y = z * _normal_cdf(z)
    elif KIND == "silu":
        y = z / (1.0 + tl.exp2(-1.4426950408889634 * z))
    else:
        # z (1 + tanh u) / 2 = z / (1 + e^-2u) with u = sqrt(2 / pi) (z + 0.044715 z^3); -2 / ln 2 is in the constants.
        y = z / (1.0 + tl.exp2(z * (-2.302208198144325 - 0.1029432395800235 * (z * z))))
    return y


@triton.jit
def _activate_and_slope(z, KIND: tl.constexpr):
    if KIND == "gelu_erf":
        gate = _normal_cdf(z)
        slope = gate + z * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z))
    elif KIND == "silu":
        gate = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))
        slope = gate + z * (gate * (1.0 - gate))
    else:
        square = tl.minimum(z * z, 1e4)  # keeps 0 x inf out of the slope; where it binds, gate is 0 or 1 already
        gate = 1.0 / (1.0 + tl.exp2(z * (-2.302208198144325 - 0.1029432395800235 * square)))
        slope = gate + z * (gate * (1.0 - gate) * (1.5957691216057308 + 0.21406444881780073 * square))
    return z * gate, slope


@triton.jit
def _bias_gelu_kernel(
    x_TF, bias_F, y_TF, T, F, x_stride, column_tiles,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mask = (row[:, None] < T) & (column[None, :] < F)
    z = tl.load(x_TF + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_F + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    y = _activate(z, KIND)
    tl.store(y_TF + row[:, None] * F + column[None, :], y.to(y_TF.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_backward_kernel(
    dy_TF, x_TF, bias_F, dx_TF, partial_PF, T, F, dy_stride, x_stride, column_tiles, groups,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(0) // column_tiles
    if HAS_BIAS:
        bias = tl.load(bias_F + column, mask=column < F, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(group, tl.cdiv(T, ROWS), groups):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row[:, None] < T) & (column[None, :] < F)
        z = tl.load(x_TF + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += bias[None, :]
        dy = tl.load(dy_TF + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        _, slope = _activate_and_slope(z, KIND)
        dx = dy * slope
        tl.store(dx_TF + row[:, None] * F + column[None, :], dx.to(dx_TF.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            total += dx
    if HAS_BIAS:
        tl.store(partial_PF + group.to(tl.int64) * F + column, tl.sum(total, 0), mask=column < F)


@triton.jit
def _gated_kernel(
    x_T2F, bias_2F, y_TF, T, F, x_stride, column_tiles,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mask = (row[:, None] < T) & (column[None, :] < F)
    offset = row[:, None] * x_stride + column[None, :]
    gate = tl.load(x_T2F + offset, mask=mask, other=0.0).to(tl.float32)
    linear = tl.load(x_T2F + F + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        gate += tl.load(bias_2F + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
        linear += tl.load(bias_2F + F + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    y = _activate(gate, KIND) * linear
    tl.store(y_TF + row[:, None] * F + column[None, :], y.to(y_TF.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward_kernel(
    dy_TF, x_T2F, bias_2F, dx_T2F, partial_P2F, T, F, dy_stride, x_stride, column_tiles, groups,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(0) // column_tiles
    if HAS_BIAS:
        gate_bias = tl.load(bias_2F + column, mask=column < F, other=0.0).to(tl.float32)
        linear_bias = tl.load(bias_2F + F + column, mask=column < F, other=0.0).to(tl.float32)
    gate_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    linear_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(group, tl.cdiv(T, ROWS), groups):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row[:, None] < T) & (column[None, :] < F)
        offset = row[:, None] * x_stride + column[None, :]
        gate = tl.load(x_T2F + offset, mask=mask, other=0.0).to(tl.float32)
        linear = tl.load(x_T2F + F + offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            gate += gate_bias[None, :]
            linear += linear_bias[None, :]
        dy = tl.load(dy_TF + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        activated, slope = _activate_and_slope(gate, KIND)
        dgate = dy * linear * slope
        dlinear = dy * activated
        dx = dx_T2F + row[:, None] * (2 * F) + column[None, :]
        tl.store(dx, dgate.to(dx_T2F.dtype.element_ty), mask=mask)
        tl.store(dx + F, dlinear.to(dx_T2F.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            gate_total += dgate
            linear_total += dlinear
    if HAS_BIAS:
        partial = partial_P2F + group.to(tl.int64) * (2 * F) + column
        tl.store(partial, tl.sum(gate_total, 0), mask=column < F)
        tl.store(partial + F, tl.sum(linear_total, 0), mask=column < F)


def _rows(x: Tensor) -> Tensor:
    """x itself where each token's values lie together, else a copy of which that is true."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _forward(kernel: Any, x: Tensor, bias: Tensor | None, name: str, rows: int, warps: int) -> Tensor:
    tokens, ffn = x.shape[0], x.shape[-1]
    x, bias = _rows(x), None if bias is None else bias.contiguous()
    y_TF = torch.empty((tokens, ffn), dtype=x.dtype, device=x.device)
    column_tiles = triton.cdiv(ffn, _COLUMNS)
    if tokens:
        with torch.cuda.device_of(x):
            kernel[(triton.cdiv(tokens, rows) * column_tiles,)](
                x, x if bias is None else bias, y_TF, tokens, ffn, x.stride(0), column_tiles,
                KIND=_ACTIVATION[name], HAS_BIAS=bias is not None, ROWS=rows, COLUMNS=_COLUMNS, num_warps=warps,
            )  # fmt: skip
    return y_TF


def _backward(
    kernel: Any, dy_TF: Tensor, x: Tensor, bias: Tensor | None, name: str, rows: int, warps: int
) -> tuple[Tensor, Tensor]:
    """(dx, dbias), the latter empty without a bias. Each program sums the rows of one group for its columns."""
    tokens, ffn = x.shape[0], x.shape[-1]
    dy_TF, x, bias = _rows(dy_TF), _rows(x), None if bias is None else bias.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    column_tiles, row_tiles = triton.cdiv(ffn, _COLUMNS), triton.cdiv(tokens, rows)
    # With a bias, three programs for each SM: what fits at once in bf16, so that partial sums are few.
    groups = row_tiles if bias is None else min(row_tiles, max(1, 3 * target_of(x).num_sms // column_tiles))
    partial_1PN = torch.empty((1, groups, 0 if bias is None else bias.numel()), dtype=torch.float32, device=x.device)
    if tokens:
        with torch.cuda.device_of(x):
            kernel[(groups * column_tiles,)](
                dy_TF, x, x if bias is None else bias, dx, partial_1PN, tokens, ffn, dy_TF.stride(0), x.stride(0),
                column_tiles, groups,
                KIND=_ACTIVATION[name], HAS_BIAS=bias is not None, ROWS=rows, COLUMNS=_COLUMNS, num_warps=warps,
            )  # fmt: skip
    if bias is None:
        return dx, torch.empty(0, dtype=x.dtype, device=x.device)
    return dx, sum_partials(partial_1PN, bias.dtype).view(bias.shape)


def _gradients_like(dy: Tensor, x: Tensor, bias: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


@torch.library.custom_op("megapoly::bias_gelu", mutates_args=())
def _bias_gelu(x_TF: Tensor, bias_F: Tensor | None, approximate: str) -> Tensor:
    return _forward(_bias_gelu_kernel, x_TF, bias_F, approximate, rows=16, warps=4)


@_bias_gelu.register_fake
def _(x_TF: Tensor, bias_F: Tensor | None, approximate: str) -> Tensor:
    return x_TF.new_empty(x_TF.shape)


@torch.library.custom_op("megapoly::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(dy_TF: Tensor, x_TF: Tensor, bias_F: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return _backward(_bias_gelu_backward_kernel, dy_TF, x_TF, bias_F, approximate, rows=16, warps=8)


_bias_gelu_backward.register_fake(_gradients_like)


@torch.library.custom_op("megapoly::gated_activation", mutates_args=())
def _gated_activation(x_T2F: Tensor, bias_2F: Tensor | None, kind: str) -> Tensor:
    return _forward(_gated_kernel, x_T2F, bias_2F, kind, rows=8, warps=4)


@_gated_activation.register_fake
def _(x_T2F: Tensor, bias_2F: Tensor | None, kind: str) -> Tensor:
    return x_T2F.new_empty(x_T2F.shape[0], x_T2F.shape[2])


@torch.library.custom_op("megapoly::gated_activation_backward", mutates_args=())
def _gated_activation_backward(
    dy_TF: Tensor, x_T2F: Tensor, bias_2F: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    return _backward(_gated_backward_kernel, dy_TF, x_T2F, bias_2F, kind, rows=8, warps=8)


_gated_activation_backward.register_fake(_gradients_like)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, bias_F: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x_TF, bias_F)
        ctx.approximate = approximate
        return _bias_gelu(x_TF, bias_F, approximate)

    @staticmethod
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TF, bias_F = ctx.saved_tensors
        dx_TF, dbias_F = _bias_gelu_backward(dy_TF, x_TF, bias_F, ctx.approximate)
        return dx_TF, None if bias_F is None else dbias_F, None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T2F: Tensor, bias_2F: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(x_T2F, bias_2F)
        ctx.kind = kind
        return _gated_activation(x_T2F, bias_2F, kind)

    @staticmethod
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_T2F, bias_2F = ctx.saved_tensors
        dx_T2F, dbias_2F = _gated_activation_backward(dy_TF, x_T2F, bias_2F, ctx.kind)
        return dx_T2F, None if bias_2F is None else dbias_2F, None


def bias_gelu_reference(x_TF: Tensor, bias_F: Tensor | None, approximate: str) -> Tensor:
    """The operation in plain torch."""
    return F.gelu(x_TF if bias_F is None else x_TF + bias_F, approximate=approximate)


def bias_gelu(x_TF: Tensor, bias_F: Tensor | None, approximate: str, backend: str | None = None) -> Tensor:
    """GELU of x + bias.

    x_TF is [tokens, ffn], bias_F [ffn] or None; approximate is `tanh` (Megatron-LM, GPT-2) or `none` (erf, GPT-NeoX).
    The kernel adds in fp32, torch in the type of x. `backend`: triton or torch (default: triton on a GPU).
    """
    if resolve_backend(backend, x_TF) == "torch":
        return bias_gelu_reference(x_TF, bias_F, approximate)
    return _BiasGelu.apply(x_TF, bias_F, approximate)


def gated_activation_reference(x_T2F: Tensor, bias_2F: Tensor | None, kind: str) -> Tensor:
    """The operation in plain torch."""
    gate_TF, linear_TF = (x_T2F if bias_2F is None else x_T2F + bias_2F).unbind(-2)
    return (F.silu(gate_TF) if kind == "swiglu" else F.gelu(gate_TF)) * linear_TF


def gated_activation(x_T2F: Tensor, bias_2F: Tensor | None, kind: str, backend: str | None = None) -> Tensor:
    """act(gate) x linear.

    x_T2F is [tokens, 2, ffn] with the gate first, bias_2F [2, ffn] or None; kind is `swiglu` or `geglu` (exact GELU).
    The kernel computes in fp32 throughout. `backend`: triton or torch (default: triton on a GPU).
    """
    if resolve_backend(backend, x_T2F) == "torch":
        return gated_activation_reference(x_T2F, bias_2F, kind)
    return _GatedActivation.apply(x_T2F, bias_2F, kind)
