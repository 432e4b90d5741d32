"""Collectives over an axis. An axis of one rank returns its input, so that one process runs the same code.

Activations are flat in tokens: x_TH holds all tokens, x_tH this tensor-parallel rank's share of them under sequence
parallel (Korthikanti et al. 2022, arXiv 2205.05198).
"""

from collections.abc import Sequence
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


class Pending:
    """The result of collectives that may still be under way; what they read is kept until they are done."""

    __slots__ = ("_reads", "_works", "result", "what")

    def __init__(
        self, result: Tensor, works: Sequence["dist.Work | Pending | None"] = (), reads: object = None, what: str = ""
    ) -> None:
        self.result, self._works, self._reads, self.what = result, works, reads, what

    def wait(self) -> Tensor:
        """The complete result. On a GPU the current stream waits and the host goes on."""
        for work in self._works:
            if work is not None:
                work.wait()
        self._works, self._reads = (), None
        return self.result


def start_all_reduce_(x: Tensor, axis: Axis, keep: object = None) -> Pending:
    """Begin to sum over the axis, in place; `keep` is kept until that is done."""
    if axis.size == 1:
        return Pending(x)
    return Pending(x, (dist.all_reduce(x, group=axis.group, async_op=True),), keep, f"all_reduce over {axis.name}")


def start_all_gather(x_tH: Tensor, axis: Axis, out_TH: Tensor | None = None) -> Pending:
    """Begin to concatenate the ranks' parts along dimension 0, in out_TH if given, of which x_tH may be this rank's."""
    if axis.size == 1:
        return Pending(x_tH)
    x_tH = x_tH.contiguous()
    if out_TH is None:
        out_TH = x_tH.new_empty((x_tH.shape[0] * axis.size, *x_tH.shape[1:]))
    return Pending(
        out_TH, (_all_gather(out_TH, x_tH, group=axis.group, async_op=True),), x_tH, f"all_gather over {axis.name}"
    )


def start_reduce_scatter(x_TH: Tensor, axis: Axis, out_tH: Tensor | None = None) -> Pending:
    """Begin to sum over the axis, keeping this rank's part of dimension 0, in out_tH if given."""
    if axis.size == 1:
        return Pending(x_TH)
    x_TH = x_TH.contiguous()
    if out_tH is None:
        out_tH = x_TH.new_empty((x_TH.shape[0] // axis.size, *x_TH.shape[1:]))
    return Pending(
        out_tH,
        (_reduce_scatter(out_tH, x_TH, group=axis.group, async_op=True),),
        x_TH,
        f"reduce_scatter over {axis.name}",
    )


def all_gather(x_tH: Tensor, axis: Axis) -> Tensor:
    """Concatenate the ranks' parts along dimension 0."""
    return start_all_gather(x_tH, axis).wait()


def reduce_scatter(x_TH: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis and keep this rank's part of dimension 0."""
    return start_reduce_scatter(x_TH, axis).wait()


def gather_to_first_(out_TH: Tensor | None, x_tH: Tensor, axis: Axis) -> None:
    """Concatenate the ranks' parts along dimension 0 in out_TH, which the axis's first rank gives, of at least two."""
    parts = None if out_TH is None else list(out_TH.detach().chunk(axis.size))
    dist.gather(x_tH.detach(), parts, group=axis.group, group_dst=0)


def scatter_from_first_(out_tH: Tensor, x_TH: Tensor | None, axis: Axis) -> Tensor:
    """Take this rank's part of dimension 0 of x_TH, which the axis's first rank gives, of at least two; returns it."""
    dist.scatter(out_tH, None if x_TH is None else list(x_TH.chunk(axis.size)), group=axis.group, group_src=0)
    return out_tH


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
