"""LayerNorm and RMSNorm fused with the residual add: kernels, launchers and their autograd function.

Ba, Kiros, Hinton 2016, arXiv 1607.06450; Zhang and Sennrich 2019, arXiv 1910.07467. Saved for the backward are the new
residual, which the next layer reads anyway, and the fp32 statistics. Rows up to 8192 wide are held in registers by one
program, which in the backward walks over many rows and keeps its share of the parameters' gradients there too; wider
rows are walked in column tiles, and the parameters' gradients take a kernel of their own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapoly_kernels.launch import sum_partials, target_of

WIDEST_TILE = 8192  # a wider row does not fit the registers beside the gradients of weight and bias
FORWARD_TILE = 2048  # elements of a program: narrow rows share one
BACKWARD_TILE = 4096  # more, so that fewer programs leave fewer partial sums
ELEMENTS_A_THREAD = 16  # two 128-bit loads of bf16; the backward then fits 128 registers
WARPS_AN_SM = 16  # of 128 registers: all that an SM has
WIDE_TILE = 4096  # columns of a wide row
PARAMETER_ROWS, PARAMETER_COLUMNS = 16, 256  # tile of the parameters' own kernel


@triton.jit
def _add(branch, residual, branch_at, residual_at, mask):
    """The new residual, rounded to its own type."""
    total = tl.load(residual + residual_at, mask=mask, other=0.0)
    if branch is not None:
        added = tl.load(branch + branch_at, mask=mask, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + added).to(residual.dtype.element_ty)
    return total


@triton.jit
def _scale(x, mean, rstd, weight, bias, column, mask, IS_RMS: tl.constexpr):
    """The normalised value in the weight's type."""
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if IS_RMS:
        rounded = (x * rstd).to(weight.dtype.element_ty)
        normed = rounded.to(tl.float32) * w
    else:
        normed = (x - mean) * rstd * w + tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return normed.to(weight.dtype.element_ty)


@triton.jit
def norm_forward_kernel(
    branch, residual, weight, bias, normed, new_residual, statistics, branch_stride, residual_stride, rows, eps,
    H: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr, IS_RMS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: add the branch, take the statistics, normalise."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK_H)[None, :]
    is_row, is_column = row < rows, column < H
    mask = is_row & is_column
    at = row.to(tl.int64)
    total = _add(branch, residual, at * branch_stride + column, at * residual_stride + column, mask)
    if branch is not None:
        tl.store(new_residual + at * H + column, total, mask=mask)
    x = total.to(tl.float32)
    mean = 0.0
    if not IS_RMS:
        mean = tl.sum(x, 1, keep_dims=True) / H
        tl.store(statistics + rows + at, mean, mask=is_row)
    centred = tl.where(is_column, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / H + eps)
    tl.store(statistics + at, rstd, mask=is_row)
    tl.store(normed + at * H + column, _scale(x, mean, rstd, weight, bias, column, is_column, IS_RMS), mask=mask)


@triton.jit
def norm_forward_wide_kernel(
    branch, residual, weight, bias, normed, new_residual, statistics, branch_stride, residual_stride, rows, eps,
    H: tl.constexpr, BLOCK_H: tl.constexpr, IS_RMS: tl.constexpr,
):  # fmt: skip
    """One row wider than a tile: statistics over its tiles, then a second walk that normalises."""
    at = tl.program_id(0).to(tl.int64)
    mean, squares = 0.0, 0.0
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        mask = column < H
        total = _add(branch, residual, at * branch_stride + column, at * residual_stride + column, mask)
        if branch is not None:
            tl.store(new_residual + at * H + column, total, mask=mask)
        x = total.to(tl.float32)
        if IS_RMS:
            squares += tl.sum(x * x, 0)
        else:
            # Centred within the tile, then joined with the tiles before it (Chan et al. 1979): no cancellation.
            width = tl.minimum(H - start, BLOCK_H) * 1.0
            tile_mean = tl.sum(x, 0) / width
            centred = tl.where(mask, x - tile_mean, 0.0)
            share = width / (start + width)
            shift = tile_mean - mean
            squares += tl.sum(centred * centred, 0) + shift * shift * start * share
            mean += shift * share
    rstd = tl.rsqrt(squares / H + eps)
    tl.store(statistics + at, rstd)
    if not IS_RMS:
        tl.store(statistics + rows + at, mean)
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        mask = column < H
        # Added anew: what this program has just stored may have been written by another thread.
        total = _add(branch, residual, at * branch_stride + column, at * residual_stride + column, mask)
        scaled = _scale(total.to(tl.float32), mean, rstd, weight, bias, column, mask, IS_RMS)
        tl.store(normed + at * H + column, scaled, mask=mask)


@triton.jit
def _normalise(x, statistics, at, rows, is_row, IS_RMS: tl.constexpr):
    """(x - mean) x rstd in fp32, and rstd; zero for rows beyond the last."""
    rstd = tl.load(statistics + at, mask=is_row, other=0.0)
    x = x.to(tl.float32)
    if not IS_RMS:
        x -= tl.load(statistics + rows + at, mask=is_row, other=0.0)
    return x * rstd, rstd


@triton.jit
def _weight_share(dy, normalised, weight, IS_RMS: tl.constexpr):
    """What an element adds to the weight's gradient; RMSNorm's forward multiplied the rounded value."""
    if IS_RMS:
        normalised = normalised.to(weight.dtype.element_ty).to(tl.float32)
    return dy * normalised


@triton.jit
def _store_gradient(d_x, d_total, d_residual, d_branch, d_total_at, at, mask):
    """Add what came along the residual stream; write the sum in the type of each of its terms."""
    if d_total is not None:
        d_x += tl.load(d_total + d_total_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_residual + at, d_x.to(d_residual.dtype.element_ty), mask=mask)
    if d_branch is not None:
        tl.store(d_branch + at, d_x.to(d_branch.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    d_normed, d_total, total, statistics, weight, d_residual, d_branch, partials, d_normed_stride, d_total_stride,
    total_stride, rows, H: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr, IS_RMS: tl.constexpr,
):  # fmt: skip
    """Whole rows in strides of the grid: their gradients, and this program's sums for the parameters."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_H)[None, :]
    is_column = column < H
    w = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    # One sum a row of the tile: they are added up once, after the loop.
    d_weight = tl.zeros([ROWS, BLOCK_H], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK_H], tl.float32)
    # Two stages: the next rows are on their way to shared memory while the sums over these wait at barriers.
    for first in tl.range(program * ROWS, rows, programs * ROWS, num_stages=2):
        row = first + tl.arange(0, ROWS)[:, None]
        is_row = row < rows
        mask = is_row & is_column
        at = row.to(tl.int64)
        dy = tl.load(d_normed + at * d_normed_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(total + at * total_stride + column, mask=mask, other=0.0)
        normalised, rstd = _normalise(x, statistics, at, rows, is_row, IS_RMS)
        d_weight += _weight_share(dy, normalised, weight, IS_RMS)
        scaled = dy * w
        d_x = scaled - normalised * (tl.sum(scaled * normalised, 1, keep_dims=True) / H)
        if not IS_RMS:
            d_bias += dy
            d_x -= tl.sum(scaled, 1, keep_dims=True) / H
        _store_gradient(
            d_x * rstd, d_total, d_residual, d_branch, at * d_total_stride + column, at * H + column, mask
        )  # fmt: skip
    column = tl.arange(0, BLOCK_H)
    partials += program * H + column
    tl.store(partials, tl.sum(d_weight, 0), mask=column < H)
    if not IS_RMS:
        tl.store(partials + programs * H, tl.sum(d_bias, 0), mask=column < H)


@triton.jit
def norm_backward_wide_kernel(
    d_normed, d_total, total, statistics, weight, d_residual, d_branch, d_normed_stride, d_total_stride, total_stride,
    rows, H: tl.constexpr, BLOCK_H: tl.constexpr, IS_RMS: tl.constexpr,
):  # fmt: skip
    """Gradient of one row wider than a tile."""
    at = tl.program_id(0).to(tl.int64)
    along = tl.zeros([BLOCK_H], tl.float32)
    level = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        mask = column < H
        dy = tl.load(d_normed + at * d_normed_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(total + at * total_stride + column, mask=mask, other=0.0)
        normalised, rstd = _normalise(x, statistics, at, rows, True, IS_RMS)
        scaled = dy * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        along += scaled * normalised
        if not IS_RMS:
            level += scaled
    mean_along, mean_level = tl.sum(along, 0) / H, tl.sum(level, 0) / H
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        mask = column < H
        dy = tl.load(d_normed + at * d_normed_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(total + at * total_stride + column, mask=mask, other=0.0)
        normalised, rstd = _normalise(x, statistics, at, rows, True, IS_RMS)
        scaled = dy * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        d_x = (scaled - normalised * mean_along - mean_level) * rstd
        _store_gradient(d_x, d_total, d_residual, d_branch, at * d_total_stride + column, at * H + column, mask)


@triton.jit
def norm_parameters_kernel(
    d_normed, total, statistics, weight, partials, d_normed_stride, total_stride, rows,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_RMS: tl.constexpr,
):  # fmt: skip
    """Sums of some columns over rows in strides of the grid, for the gradients of the parameters."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    d_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        is_row = row < rows
        mask = is_row & (column < H)
        at = row.to(tl.int64)
        dy = tl.load(d_normed + at * d_normed_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(total + at * total_stride + column, mask=mask, other=0.0)
        normalised, _ = _normalise(x, statistics, at, rows, is_row, IS_RMS)
        d_weight += _weight_share(dy, normalised, weight, IS_RMS)
        if not IS_RMS:
            d_bias += dy
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    partials += program * H + column
    tl.store(partials, tl.sum(d_weight, 0), mask=column < H)
    if not IS_RMS:
        tl.store(partials + programs * H, tl.sum(d_bias, 0), mask=column < H)


def _tile(width: int, elements: int) -> tuple[int, int, int]:
    """Columns, rows and warps of a tile of at least `elements`."""
    columns = max(16, triton.next_power_of_2(width))
    rows = max(1, elements // columns)
    return columns, rows, max(1, rows * columns // (32 * ELEMENTS_A_THREAD))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("megapoly::norm_forward", mutates_args=())
def norm_forward(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, new residual, statistics fp32 [1 or 2, tokens]: rstd, mean); RMSNorm where there is no bias.

    Without a branch there is no new residual, and the tensor in its place is empty.
    """
    residual_TH, is_rms = _unit_stride(residual_TH), bias_H is None
    branch_TH = None if branch_TH is None else _unit_stride(branch_TH)
    rows, width = residual_TH.shape
    normed_TH, new_TH, statistics_ST = _empty_outputs(branch_TH, residual_TH, weight_H, bias_H, eps)
    arguments = (
        branch_TH, residual_TH, weight_H.contiguous(), None if bias_H is None else bias_H.contiguous(), normed_TH,
        new_TH, statistics_ST, 0 if branch_TH is None else branch_TH.stride(0), residual_TH.stride(0), rows, eps,
    )  # fmt: skip
    with torch.cuda.device_of(residual_TH):
        if width > WIDEST_TILE:
            norm_forward_wide_kernel[(rows,)](*arguments, H=width, BLOCK_H=WIDE_TILE, IS_RMS=is_rms, num_warps=8)
        else:
            columns, tile_rows, warps = _tile(width, FORWARD_TILE)
            norm_forward_kernel[(triton.cdiv(rows, tile_rows),)](
                *arguments, H=width, BLOCK_H=columns, ROWS=tile_rows, IS_RMS=is_rms, num_warps=warps
            )
    return normed_TH, new_TH, statistics_ST


@norm_forward.register_fake
def _empty_outputs(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = residual_TH.shape
    return (
        weight_H.new_empty(shape),
        residual_TH.new_empty(0 if branch_TH is None else shape),
        residual_TH.new_empty((1 if bias_H is None else 2, shape[0]), dtype=torch.float32),
    )


@torch.library.custom_op("megapoly::norm_backward", mutates_args=())
def norm_backward(
    d_normed_TH: Tensor, d_total_TH: Tensor | None, total_TH: Tensor, statistics_ST: Tensor, weight_H: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the residual, of the branch and of the parameters [1 or 2, hidden]: weight, bias.

    The branch's is empty where branch_dtype is None, which stands for no branch and for one of the residual's type.
    """
    d_normed_TH, total_TH, weight_H = _unit_stride(d_normed_TH), _unit_stride(total_TH), weight_H.contiguous()
    d_total_TH = None if d_total_TH is None else _unit_stride(d_total_TH)
    rows, width = total_TH.shape
    is_rms, sms = len(statistics_ST) == 1, target_of(total_TH).num_sms
    d_residual_TH, d_branch_TH, _ = _empty_gradients(
        d_normed_TH, d_total_TH, total_TH, statistics_ST, weight_H, branch_dtype
    )
    strides = (d_normed_TH.stride(0), 0 if d_total_TH is None else d_total_TH.stride(0), total_TH.stride(0))
    inputs = (d_normed_TH, d_total_TH, total_TH, statistics_ST, weight_H)
    outputs = (d_residual_TH, None if branch_dtype is None else d_branch_TH)
    with torch.cuda.device_of(total_TH):
        if width > WIDEST_TILE:
            norm_backward_wide_kernel[(rows,)](
                *inputs, *outputs, *strides, rows, H=width, BLOCK_H=WIDE_TILE, IS_RMS=is_rms, num_warps=8
            )
            tiles = triton.cdiv(width, PARAMETER_COLUMNS)
            programs = min(triton.cdiv(rows, PARAMETER_ROWS), triton.cdiv(4 * sms, tiles))
            partial_SPH = statistics_ST.new_empty((len(statistics_ST), programs, width))
            norm_parameters_kernel[(tiles, programs)](
                d_normed_TH, total_TH, statistics_ST, weight_H, partial_SPH, strides[0], strides[2], rows, H=width,
                ROWS=PARAMETER_ROWS, COLUMNS=PARAMETER_COLUMNS, IS_RMS=is_rms, num_warps=8,
            )  # fmt: skip
        else:
            columns, tile_rows, warps = _tile(width, BACKWARD_TILE)
            programs = min(triton.cdiv(rows, tile_rows), sms * max(1, WARPS_AN_SM // warps))
            partial_SPH = statistics_ST.new_empty((len(statistics_ST), programs, width))
            norm_backward_kernel[(programs,)](
                *inputs, *outputs, partial_SPH, *strides, rows, H=width, BLOCK_H=columns, ROWS=tile_rows,
                IS_RMS=is_rms, num_warps=warps,
            )  # fmt: skip
    return d_residual_TH, d_branch_TH, sum_partials(partial_SPH, weight_H.dtype)


@norm_backward.register_fake
def _empty_gradients(
    d_normed_TH: Tensor, d_total_TH: Tensor | None, total_TH: Tensor, statistics_ST: Tensor, weight_H: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        total_TH.new_empty(total_TH.shape),
        total_TH.new_empty(0 if branch_dtype is None else total_TH.shape, dtype=branch_dtype),
        weight_H.new_empty((len(statistics_ST), total_TH.shape[1])),
    )


class _ResidualNorm(torch.autograd.Function):
    """(normed, new residual), or normed alone where there is no branch; RMSNorm where there is no bias."""

    @staticmethod
    def forward(
        ctx: Any, branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        normed_TH, new_TH, statistics_ST = norm_forward(branch_TH, residual_TH, weight_H, bias_H, eps)
        ctx.set_materialize_grads(False)
        ctx.branch_dtype = None if branch_TH is None else branch_TH.dtype
        ctx.save_for_backward(residual_TH if branch_TH is None else new_TH, statistics_ST, weight_H)
        return normed_TH if branch_TH is None else (normed_TH, new_TH)

    @staticmethod
    def backward(ctx: Any, d_normed_TH: Tensor | None, d_total_TH: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total_TH, statistics_ST, weight_H = ctx.saved_tensors
        dtype = ctx.branch_dtype
        if d_normed_TH is None:
            d_branch_TH = None if d_total_TH is None or dtype is None else d_total_TH.to(dtype)
            return d_branch_TH, d_total_TH, None, None, None
        d_residual_TH, d_branch_TH, d_parameters_SH = norm_backward(
            d_normed_TH, d_total_TH, total_TH, statistics_ST, weight_H, None if dtype == total_TH.dtype else dtype
        )
        if dtype is None or dtype == total_TH.dtype:
            d_branch_TH = None if dtype is None else d_residual_TH
        d_bias_H = d_parameters_SH[1] if len(statistics_ST) == 2 else None
        return d_branch_TH, d_residual_TH, d_parameters_SH[0], d_bias_H, None


def residual_norm(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What layer_norm and, without a bias, rms_norm return, by the kernels."""
    output = _ResidualNorm.apply(branch_TH, residual_TH, weight_H, bias_H, eps)
    return (output, residual_TH) if branch_TH is None else output
