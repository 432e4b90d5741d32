"""Collectives over an axis. An axis of one rank returns its input, so that one process runs the same code.

Activations are flat in tokens: x_TH holds all tokens, x_tH this tensor-parallel rank's share of them under sequence
parallel (Korthikanti et al. 2022, arXiv 2205.05198).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.parallel.mesh import Axis

# torch 2.13 renamed these two; 2.11 knows the older names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Sum (or op) over the axis, in place; returns x."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather(x_tH: Tensor, axis: Axis) -> Tensor:
    """Concatenate the ranks' parts along dimension 0."""
    if axis.size == 1:
        return x_tH
    x_TH = x_tH.new_empty((x_tH.shape[0] * axis.size, *x_tH.shape[1:]))
    _all_gather(x_TH, x_tH.contiguous(), group=axis.group)
    return x_TH


def reduce_scatter(x_TH: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis and keep this rank's part of dimension 0."""
    if axis.size == 1:
        return x_TH
    x_tH = x_TH.new_empty((x_TH.shape[0] // axis.size, *x_TH.shape[1:]))
    _reduce_scatter(x_tH, x_TH.contiguous(), group=axis.group)
    return x_tH


def start_all_reduce(x: Tensor, axis: Axis) -> dist.Work | None:
    """Start summing x over the axis in place; None where there is nothing to wait for."""
    return dist.all_reduce(x, group=axis.group, async_op=True) if axis.size > 1 else None


def start_reduce_scatter(part: Tensor, whole: Tensor, axis: Axis) -> dist.Work | None:
    """Start summing `whole` over the axis into every rank's `part`; both stay untouched until it is waited for.

    On an axis of one rank nothing happens: there, `part` is `whole`.
    """
    return _reduce_scatter(part, whole, group=axis.group, async_op=True) if axis.size > 1 else None


def start_all_gather(whole: Tensor, part: Tensor, axis: Axis) -> dist.Work | None:
    """Start gathering every rank's `part`, which may lie at its own place of `whole`; none for an axis of one rank."""
    return _all_gather(whole, part, group=axis.group, async_op=True) if axis.size > 1 else None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_(grads[0].contiguous().clone(), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tH: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x_tH, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.axis), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x_TH, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.axis), None


def enter_tensor_parallel(x: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
    """The input of column-parallel layers, all tokens on every rank.

    Forward: copy, backward: all-reduce (Megatron-LM's f). Under sequence parallel, forward: all-gather of the tokens,
    backward: reduce-scatter (its g-bar).
    """
    if axis.size == 1:
        return x
    result: Tensor = (_Gather if sequence_parallel else _Copy).apply(x, axis)
    return result


def leave_tensor_parallel(x_TH: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
    """The sum of what row-parallel layers computed.

    Forward: all-reduce, backward: copy (Megatron-LM's g). Under sequence parallel, forward: reduce-scatter over tokens,
    backward: all-gather.
    """
    if axis.size == 1:
        return x_TH
    result: Tensor = (_Scatter if sequence_parallel else _Reduce).apply(x_TH, axis)
    return result
