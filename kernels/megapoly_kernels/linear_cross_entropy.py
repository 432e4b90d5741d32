"""The output layer and its cross entropy together, chunk by chunk of tokens, so that the logits are never whole.

The gradients are made in the forward pass, where a chunk's logits still exist (Hsu et al. 2024, arXiv 2410.10989):
three matrix products instead of four. The chunks are large, and the weight's gradient is summed in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly_kernels.accumulate import accumulate_
from megapoly_kernels.cross_entropy import Criterion, all_gather

# torch 2.13 renamed it; 2.11 knows the older name only.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

CACHED_LOGITS = 2**21  # of a chunk on a CPU: more fall out of its caches between one pass over them and the next


@dataclass(frozen=True)
class _Task:
    """What is computed, apart from the two matrices: all but them has no gradient.

    Tokens come as [shares, tokens of a share]: under sequence parallel each rank holds one share, else there is one.
    """

    labels_RT: Tensor
    grad_RT: Tensor
    criterion: Criterion
    chunk: int
    main_grad: Tensor | None
    recompute: bool

    @property
    def shares(self) -> int:
        return self.labels_RT.shape[0]

    def logits(self, x_tH: Tensor, weight_vH: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(tokens of each share, all shares' rows of x, their logits) chunk by chunk; the logits share one buffer."""
        tokens = x_tH.shape[0]
        spans = [slice(begin, min(begin + self.chunk, tokens)) for begin in range(0, tokens, self.chunk)]
        buffer_Nv = x_tH.new_empty((min(self.chunk, tokens) * self.shares, weight_vH.shape[0]))
        following = [self._gather(x_tH[span]) for span in spans[:1]]
        for i, span in enumerate(spans):
            x_NH, work = following.pop()
            if work is not None:
                work.wait()
            following += [self._gather(x_tH[after]) for after in spans[i + 1 : i + 2]]  # while this chunk computes
            logits_Nv = buffer_Nv[: len(x_NH)]
            torch.mm(x_NH, weight_vH.t(), out=logits_Nv)
            yield span, x_NH, logits_Nv

    def _gather(self, x_nH: Tensor) -> tuple[Tensor, dist.Work | None]:
        if self.shares == 1:
            return x_nH, None
        x_NH = x_nH.new_empty((self.shares * x_nH.shape[0], x_nH.shape[1]))
        return x_NH, all_gather(x_NH, x_nH, group=self.criterion.group, async_op=True)


class _Gradients:
    """dX and dW, chunk by chunk; dX is summed over the ranks while the next chunk computes."""

    def __init__(self, task: _Task, x_tH: Tensor, weight_vH: Tensor, needs_x: bool, needs_weight: bool) -> None:
        self.task, self.weight_vH = task, weight_vH
        self.x_tH = torch.empty_like(x_tH) if needs_x else None
        self.weight_grad_vH: Tensor | None = None
        if needs_weight:
            self.weight_grad_vH = task.main_grad
            if task.main_grad is None:
                self.weight_grad_vH = torch.zeros_like(weight_vH, dtype=torch.float32)
        self._pending: tuple[dist.Work, Tensor] | None = None  # with the buffer that it reads

    def add(self, span: slice, x_NH: Tensor, grad_Nv: Tensor) -> None:
        """Add what a chunk gives, from the gradient of its logits."""
        if self.x_tH is not None:
            part_nH = self.x_tH[span]
            whole_NH = part_nH if self.task.shares == 1 else torch.empty_like(x_NH)
            torch.mm(grad_Nv, self.weight_vH, out=whole_NH)
            self._sum(whole_NH, part_nH)
        if self.weight_grad_vH is not None:
            accumulate_(self.weight_grad_vH, grad_Nv.t(), x_NH)

    def _sum(self, whole_NH: Tensor, part_nH: Tensor) -> None:
        self.wait()
        group = self.task.criterion.group
        if self.task.shares > 1:
            self._pending = _reduce_scatter(part_nH, whole_NH, group=group, async_op=True), whole_NH
        elif self.task.criterion.ranks > 1:
            self._pending = dist.all_reduce(whole_NH, group=group, async_op=True), whole_NH

    def wait(self) -> None:
        """Let the last sum arrive."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def finish(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and of the weight; None for the weight where main_grad has it."""
        self.wait()
        if self.weight_grad_vH is None or self.task.main_grad is not None:
            return self.x_tH, None
        return self.x_tH, self.weight_grad_vH.to(dtype)


def _forward(
    task: _Task, x_tH: Tensor, weight_vH: Tensor, gradients: _Gradients | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Objective, losses and log-sum-exps, both fp32 [shares, tokens of a share]; adds to the gradients if given."""
    losses_RT = torch.empty_like(task.grad_RT)
    log_sum_RT = torch.empty_like(task.grad_RT)
    for span, x_NH, logits_Nv in task.logits(x_tH, weight_vH):
        labels_N = task.labels_RT[:, span].flatten()
        losses_N, log_sum_N = task.criterion.losses(logits_Nv, labels_N)
        losses_RT[:, span], log_sum_RT[:, span] = losses_N.view(task.shares, -1), log_sum_N.view(task.shares, -1)
        if gradients is not None:
            upstream_N = task.grad_RT[:, span].flatten()
            gradients.add(span, x_NH, task.criterion.gradient(logits_Nv, labels_N, log_sum_N, upstream_N, True))
    return (task.grad_RT * losses_RT).sum(), losses_RT, log_sum_RT


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tH: Tensor, weight_vH: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
        gradients = None if task.recompute else _Gradients(task, x_tH, weight_vH, *ctx.needs_input_grad[:2])
        objective, losses_RT, log_sum_RT = _forward(task, x_tH, weight_vH, gradients)
        if gradients is None:
            ctx.save_for_backward(x_tH, weight_vH, log_sum_RT)
        else:
            ctx.save_for_backward(*gradients.finish(weight_vH.dtype))
        ctx.task = task
        ctx.mark_non_differentiable(losses_RT)
        return objective, losses_RT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        task, scale = ctx.task, grads[0]
        if task.recompute:
            return *_gradients_again(ctx, scale), None
        x_grad_tH, weight_grad_vH = ctx.saved_tensors
        if task.main_grad is None or not ctx.needs_input_grad[1]:
            return *(None if grad is None else grad * scale for grad in (x_grad_tH, weight_grad_vH)), None
        reason = "with main_grad, backward must start from the objective itself: every scale belongs into grad_T"
        if scale.is_cuda:
            torch._assert_async(scale == 1, reason)
        elif scale.device.type == "cpu" and scale != 1:
            raise ValueError(reason)
        return x_grad_tH, None, None


def _gradients_again(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    task: _Task = ctx.task
    x_tH, weight_vH, log_sum_RT = (tensor.detach() for tensor in ctx.saved_tensors)
    gradients = _Gradients(task, x_tH, weight_vH, *ctx.needs_input_grad[:2])
    upstream_RT = task.grad_RT * scale
    for span, x_NH, logits_Nv in task.logits(x_tH, weight_vH):
        labels_N, log_sum_N, upstream_N = (t[:, span].flatten() for t in (task.labels_RT, log_sum_RT, upstream_RT))
        gradients.add(span, x_NH, task.criterion.gradient(logits_Nv, labels_N, log_sum_N, upstream_N, True))
    return gradients.finish(weight_vH.dtype)


def linear_cross_entropy(
    x_tH: Tensor, weight_vH: Tensor, labels_T: Tensor, grad_T: Tensor, first_row: int, valid_rows: int, *,
    group: dist.ProcessGroup | None = None, sequence_parallel: bool = False, main_grad: Tensor | None = None,
    chunk_tokens: int | None = None, recompute: bool = False, label_smoothing: float = 0.0, z_loss: float = 0.0,
    ignore_index: int = -100, vocab_size: int | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum of grad_T x losses, losses fp32 [tokens]) of x_tH weight_vH^T; the objective has gradients, the losses none.

    x_tH is [tokens, hidden], the same on all ranks of `group`, or under `sequence_parallel` this rank's equal share of
    the tokens, in the order of ranks. weight_vH is this rank's part of the vocabulary as vocab_parallel_cross_entropy
    describes it, and so are the other options. labels_T and grad_T, fp32, are of all tokens on every rank; grad_T
    holds each token's weight with every scale in it, since the gradients are rounded to the type of x_tH with it.
    At most `chunk_tokens` rows of logits exist at a time (default: 2048 on a GPU; on a CPU what its caches hold).

    With `main_grad`, fp32 like weight_vH, the weight's gradient is added to it and autograd gets none. The gradients
    are made, and main_grad is added to, in the forward pass: backward must then start from the objective itself, or
    ValueError (on a GPU an assertion there). `recompute` makes them in the backward pass, for one more product, from
    logits computed again; then any scale may follow. Without gradients to make, only losses are computed.
    """
    shares = group.size() if group is not None and sequence_parallel else 1
    if labels_T.numel() != shares * x_tH.shape[0]:
        raise ValueError(f"{labels_T.numel()} labels for {shares} x {x_tH.shape[0]} tokens")
    criterion = Criterion(first_row, valid_rows, group, label_smoothing, z_loss, ignore_index, vocab_size, backend)
    if chunk_tokens is None:
        chunk_tokens = max(CACHED_LOGITS // weight_vH.shape[0], 128) if x_tH.is_cpu else 2048
    chunk = max(chunk_tokens // shares, 1)
    labels_RT, grad_RT = labels_T.view(shares, -1), grad_T.detach().float().view(shares, -1)
    task = _Task(labels_RT, grad_RT, criterion, chunk, main_grad, recompute)
    if torch.is_grad_enabled() and (x_tH.requires_grad or weight_vH.requires_grad):
        objective, losses_RT = _LinearCrossEntropy.apply(x_tH.contiguous(), weight_vH, task)
    else:
        objective, losses_RT, _ = _forward(task, x_tH.detach().contiguous(), weight_vH.detach(), None)
    return objective, losses_RT.view(-1)
