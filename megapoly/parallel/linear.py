"""Tensor-parallel linear layers (Shoeybi et al. 2019, arXiv 1909.08053): each rank holds a slice of every matrix.

A column-parallel layer enters tensor parallelism, a row-parallel one leaves it. Each is one autograd function with its
collectives inside: backward begins the one that completes the gradient of the input, computes the weight's gradient
meanwhile, straight into its fp32 main_grad where it has one, and waits last. Under sequence parallel (Korthikanti et
al. 2022, arXiv 2205.05198) the gathered input is not kept: it is gathered again while the input's gradient is computed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megapoly_kernels.accumulate import accumulate_
from torch import Tensor, nn

from megapoly.parallel.collectives import (
    all_gather,
    enter_tensor_parallel,
    leave_tensor_parallel,
    start_all_gather,
)
from megapoly.parallel.products import gathered_product, summed_product
from megapoly.parallel.tensor import Placement, sharded_parameter

Remake = Callable[[], Tensor]  # computes a layer's input again where it is not kept


def _weight_gradient(weight: nn.Parameter, dy_TN: Tensor, x: Callable[[], Tensor], place: Placement) -> Tensor | None:
    """dy^T x: None where the weight has a main_grad, to which it is added now or when the queue is run.

    Not in FP8: its products cannot be added to an fp32 matrix, and would need both operands once more, transposed.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return torch.mm(dy_TN.t(), x()).view(weight.shape)

    def add() -> None:
        accumulate_(main_grad.flatten(0, -2), dy_TN.t(), x())
        weight.grad_added()  # type: ignore[attr-defined]

    place.weight_gradients.add(add)
    return None


def _bias_gradient(bias: nn.Parameter, dy_tN: Tensor) -> Tensor | None:
    main_grad = getattr(bias, "main_grad", None)
    if main_grad is None:
        return dy_tN.sum(0).view(bias.shape)
    main_grad.view(-1).add_(dy_tN.sum(0, dtype=main_grad.dtype))
    bias.grad_added()  # type: ignore[attr-defined]
    return None


def _keep(
    ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, place: Placement, remake: Remake | None
) -> None:
    # Parameters are attributes: hooks on saved tensors may give back others, without main_grad.
    ctx.weight, ctx.bias, ctx.place, ctx.remake = weight, bias, place, remake
    if remake is None and ctx.needs_input_grad[1]:
        ctx.save_for_backward(x)


def _kept_input(ctx: Any) -> Tensor:
    x: Tensor = ctx.saved_tensors[0] if ctx.remake is None else ctx.remake()
    return x


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_tK: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, place: Placement, remake: Remake | None
    ) -> Tensor:
        _keep(ctx, x_tK, weight, bias, place, remake)
        flat_bias = None if bias is None else bias.flatten()
        return gathered_product(x_tK, weight.flatten(0, -2).t(), place, flat_bias)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_TN, weight, place = grads[0], ctx.weight, ctx.place
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        x = _whole_input(ctx) if needs_weight else None
        dx = summed_product(dy_TN, weight.flatten(0, -2), place, is_gradient=True) if needs_x else None
        dweight = None if x is None else _weight_gradient(weight, dy_TN, x, place)
        dbias = _bias_gradient(ctx.bias, dy_TN) if needs_bias else None
        return None if dx is None else dx.wait(), dweight, dbias, None, None


def _whole_input(ctx: Any) -> Callable[[], Tensor]:
    """All tokens of a column layer's input: gathered from now on, or with the queue open when its turn has come."""
    x_tK, place = _kept_input(ctx), ctx.place
    if not place.sequence_parallel:
        return lambda: x_tK
    if place.weight_gradients.is_open:
        return lambda: all_gather(x_tK, place.tp)
    return start_all_gather(x_tK, place.tp).wait


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_Tk: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, place: Placement, remake: Remake | None
    ) -> Tensor:
        _keep(ctx, x_Tk, weight, bias, place, remake)
        y_tN = summed_product(x_Tk, weight.t(), place).wait()
        return y_tN if bias is None else y_tN.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy_tN, weight, place = grads[0], ctx.weight, ctx.place
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx_Tk = dweight = None
        if needs_x or needs_weight:
            dx_Tk, dy_TN = gathered_product(dy_tN, weight, place, is_gradient=True, keeps=needs_weight)
        if needs_weight:
            x_Tk = _kept_input(ctx)
            assert dy_TN is not None
            dweight = _weight_gradient(weight, dy_TN, lambda: x_Tk, place)
        dbias = _bias_gradient(ctx.bias, dy_tN) if needs_bias else None
        return dx_Tk, dweight, dbias, None, None


def column_parallel_linear(
    x_tK: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, place: Placement, remake: Remake | None = None
) -> Tensor:
    """x W^T + b with W split by output features: [tokens of this rank, in] -> [all tokens, this rank's features].

    W's dimensions but the last are output dimensions, flattened in the result, which is no view of another tensor.
    With `remake` x is not kept; the backward pass calls it, once, to get x again.
    """
    if torch.compiler.is_compiling():  # a captured graph knows neither main_grad nor a queue: autograd delivers
        x_TK = enter_tensor_parallel(x_tK, place.tp, place.sequence_parallel)
        return F.linear(x_TK, weight.flatten(0, -2), None if bias is None else bias.flatten())
    result: Tensor = _ColumnParallel.apply(x_tK, weight, bias, place, remake)
    return result


def row_parallel_linear(
    x_Tk: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, place: Placement, remake: Remake | None = None
) -> Tensor:
    """x W^T summed over the ranks, + b, with W split by input features: [all tokens, this rank's in] -> [tokens, out].

    The result holds all tokens, under sequence parallel this rank's. `remake` is as in column_parallel_linear.
    """
    if torch.compiler.is_compiling():
        y_tN = leave_tensor_parallel(F.linear(x_Tk, weight), place.tp, place.sequence_parallel)
        return y_tN if bias is None else y_tN + bias
    result: Tensor = _RowParallel.apply(x_Tk, weight, bias, place, remake)
    return result


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with W split by output features: the output is this rank's features of all tokens.

    `shape` is W's whole shape; all its dimensions but the last are output dimensions, and `dim` is the one that is
    split (its size with padding is `padded`). `copied` is as in sharded_parameter.
    """

    def __init__(
        self, shape: tuple[int, ...], dim: int, place: Placement, *, bias: bool, padded: int | None = None,
        copied: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.place = place
        self.weight = sharded_parameter(shape, dim, place, "normal", padded=padded, copied=copied)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = sharded_parameter(shape[:-1], dim, place, "zeros", padded=padded, copied=copied)

    def forward(self, x_tH: Tensor, skip_bias_add: bool = False, remake: Remake | None = None) -> Tensor:
        """x_tH [tokens of this rank, in] -> [all tokens, *local output dimensions].

        With skip_bias_add the bias is left to the next fused operation. `remake`: see column_parallel_linear.
        """
        y_Tf = self.flat(x_tH, skip_bias_add, remake)
        return y_Tf if self.weight.dim() == 2 else y_Tf.view(-1, *self.weight.shape[:-1])

    def flat(self, x_tH: Tensor, skip_bias_add: bool = False, remake: Remake | None = None) -> Tensor:
        """The same as [all tokens, local features], which is no view of another tensor."""
        return column_parallel_linear(x_tH, self.weight, None if skip_bias_add else self.bias, self.place, remake)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with W split by input features; the ranks' products are summed, the bias is added once.

    Under sequence parallel the sum is scattered over tokens, and the bias gets only this rank's tokens' gradient.
    """

    def __init__(self, in_features: int, out_features: int, place: Placement, *, bias: bool) -> None:
        super().__init__()
        self.place = place
        self.weight = sharded_parameter((out_features, in_features), 1, place, "output_normal")
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = sharded_parameter((out_features,), None, place, "zeros", is_partial=place.sequence_parallel)

    def forward(self, x_Tf: Tensor, remake: Remake | None = None) -> Tensor:
        """x_Tf [all tokens, this rank's inputs] -> [tokens of this rank, out]. `remake`: see column_parallel_linear."""
        return row_parallel_linear(x_Tf, self.weight, self.bias, self.place, remake)
