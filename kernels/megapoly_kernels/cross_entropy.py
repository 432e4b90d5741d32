"""Cross entropy over a vocabulary that is split over tensor-parallel ranks (Shoeybi et al. 2019, arXiv 1909.08053).

Each rank reads its logits once (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867) and hands the others
three scalars a token. The gradient is computed from the logits again, and may be written over them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megapoly_kernels.launch import resolve_backend

# torch 2.13 renamed it; 2.11 knows the older name only.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Below any logit but -inf, and finite also when multiplied: a lane that has seen nothing needs no case of its own
# (inf - inf is NaN).
_LOWEST = tl.constexpr(-2.0e38)
# exp(x - y) is computed as exp2(x log2(e) - y log2(e)): one fused instruction before the exponential, and exp2, unlike
# exp, flushes denormal numbers, which saves three more.
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _absorb(x, max_l, sum_l):
    new_max_l = tl.maximum(max_l, tl.max(x, 1))
    base_l = new_max_l * _LOG2E
    sum_l = sum_l * tl.exp2(max_l * _LOG2E - base_l) + tl.sum(tl.exp2(x * _LOG2E - base_l[:, None]), 1)
    return new_max_l, sum_l


@triton.jit
def _stats_kernel(
    logits_Tv, labels_T, stats_3T, T, stride, width, first_row, valid_rows, ignore_index, confidence, smooth,
    SMOOTHED: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_T + row)
    logits_v = logits_Tv + row * stride
    # A lane is one thread's 16 bytes. It keeps its own maximum and sum, so that the warps meet once a row only.
    column = tl.arange(0, LANES)[:, None] * PACK + tl.arange(0, PACK)[None, :]
    max_l = tl.full([LANES], _LOWEST, tl.float32)
    sum_l = tl.zeros([LANES], tl.float32)
    total_l = tl.zeros([LANES], tl.float32)
    end = tl.where(label == ignore_index, 0, valid_rows)
    whole = end // (LANES * PACK) * (LANES * PACK)
    for first in range(0, whole, LANES * PACK):
        x = tl.load(logits_v + first + column).to(tl.float32)
        max_l, sum_l = _absorb(x, max_l, sum_l)
        if SMOOTHED:
            total_l += tl.sum(x, 1)
    if whole < end:
        at = whole + column
        # The load is masked by the width, a multiple of 16 where valid_rows may be odd: it stays 16 bytes wide.
        x = tl.load(logits_v + at, mask=at < width, other=0.0).to(tl.float32)
        max_l, sum_l = _absorb(tl.where(at < valid_rows, x, float("-inf")), max_l, sum_l)
        if SMOOTHED:
            total_l += tl.sum(tl.where(at < valid_rows, x, 0.0), 1)
    top = tl.max(max_l, 0)
    # With the difference as one fused operation, the rounding of a lane's base falls out of the sum.
    total = tl.sum(sum_l * tl.exp2(max_l * _LOG2E - top * _LOG2E), 0)
    local = label - first_row
    is_here = (local >= 0) & (local < valid_rows)
    target = confidence * tl.load(logits_v + local, mask=is_here, other=0.0).to(tl.float32)
    if SMOOTHED:
        target += smooth * tl.sum(total_l, 0)
    tl.store(stats_3T + row, top)
    tl.store(stats_3T + T + row, total)
    tl.store(stats_3T + 2 * T + row, target)


@triton.jit
def _grad_kernel(
    logits_Tv, grad_Tv, labels_T, log_sum_T, upstream_T, stride, grad_stride, width, first_row, valid_rows,
    confidence, smooth, z_loss, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    local = (tl.load(labels_T + row) - first_row).to(tl.int32)
    upstream = tl.load(upstream_T + row)
    is_used = upstream != 0.0  # false for ignored tokens, whose logits may be anything and are not read
    log_sum = tl.where(is_used, tl.load(log_sum_T + row), 0.0)
    end = tl.where(is_used, width, 0)
    x = tl.load(logits_Tv + row * stride + column, mask=column < end, other=0.0).to(tl.float32)
    scale = upstream * (1.0 + 2.0 * z_loss * log_sum)
    grad = scale * tl.exp2(x * _LOG2E - log_sum * _LOG2E) - upstream * smooth
    grad = tl.where(column == local, grad - upstream * confidence, grad)
    grad = tl.where(column < valid_rows, grad, 0.0)
    tl.store(grad_Tv + row * grad_stride + column, grad.to(grad_Tv.dtype.element_ty), mask=column < width)


@torch.library.custom_op("megapoly::cross_entropy_stats", mutates_args=())
def _stats(
    logits_Tv: Tensor, labels_T: Tensor, first_row: int, valid_rows: int, ignore_index: int, confidence: float,
    smooth: float,
) -> Tensor:  # fmt: skip
    tokens, width = logits_Tv.shape
    stats_3T = torch.empty((3, tokens), dtype=torch.float32, device=logits_Tv.device)
    if tokens:
        with torch.cuda.device_of(logits_Tv):
            _stats_kernel[(tokens,)](
                logits_Tv, labels_T, stats_3T, tokens, logits_Tv.stride(0), width, first_row, valid_rows, ignore_index,
                confidence, smooth, SMOOTHED=smooth != 0.0, LANES=512, PACK=16 // logits_Tv.element_size(), num_warps=8,
            )  # fmt: skip
    return stats_3T


@_stats.register_fake
def _(logits_Tv: Tensor, labels_T: Tensor, *_: Any) -> Tensor:
    return logits_Tv.new_empty((3, logits_Tv.shape[0]), dtype=torch.float32)


def _launch_grad(
    logits_Tv: Tensor, grad_Tv: Tensor, labels_T: Tensor, log_sum_T: Tensor, upstream_T: Tensor, *scalars: float
) -> None:
    tokens, width = logits_Tv.shape
    columns = 4096
    if tokens and width:
        with torch.cuda.device_of(logits_Tv):
            _grad_kernel[(tokens * triton.cdiv(width, columns),)](
                logits_Tv, grad_Tv, labels_T, log_sum_T, upstream_T, logits_Tv.stride(0), grad_Tv.stride(0), width,
                *scalars, COLUMNS=columns, num_warps=8,
            )  # fmt: skip


@torch.library.custom_op("megapoly::cross_entropy_grad", mutates_args=())
def _grad(
    logits_Tv: Tensor, labels_T: Tensor, log_sum_T: Tensor, upstream_T: Tensor, first_row: int, valid_rows: int,
    confidence: float, smooth: float, z_loss: float,
) -> Tensor:  # fmt: skip
    grad_Tv = torch.empty(logits_Tv.shape, dtype=logits_Tv.dtype, device=logits_Tv.device)
    scalars = (first_row, valid_rows, confidence, smooth, z_loss)
    _launch_grad(logits_Tv, grad_Tv, labels_T, log_sum_T, upstream_T, *scalars)
    return grad_Tv


@_grad.register_fake
def _(logits_Tv: Tensor, *_: Any) -> Tensor:
    return logits_Tv.new_empty(logits_Tv.shape)


@torch.library.custom_op("megapoly::cross_entropy_grad_in_place", mutates_args=("logits_Tv",))
def _grad_in_place(
    logits_Tv: Tensor, labels_T: Tensor, log_sum_T: Tensor, upstream_T: Tensor, first_row: int, valid_rows: int,
    confidence: float, smooth: float, z_loss: float,
) -> None:  # fmt: skip
    scalars = (first_row, valid_rows, confidence, smooth, z_loss)
    _launch_grad(logits_Tv, logits_Tv, labels_T, log_sum_T, upstream_T, *scalars)


@_grad_in_place.register_fake
def _(*_: Any) -> None:
    return None


def _stats_reference(logits_Tv: Tensor, local_T: Tensor, is_here_T: Tensor, criterion: "Criterion") -> Tensor:
    logits_Tv = logits_Tv.float()
    valid_Tv = logits_Tv[:, : criterion.valid_rows]
    if criterion.valid_rows:
        max_T = valid_Tv.amax(-1)
        sum_T = (valid_Tv - max_T[:, None]).exp_().sum(-1)
        target_T = torch.where(is_here_T, logits_Tv.gather(-1, local_T[:, None])[:, 0], 0.0)
    else:  # a shard that holds nothing but padding
        max_T = logits_Tv.new_full((len(logits_Tv),), -torch.inf)
        sum_T, target_T = torch.zeros_like(max_T), torch.zeros_like(max_T)
    if criterion.label_smoothing:
        target_T = criterion.confidence * target_T + criterion.smooth * valid_Tv.sum(-1)
    return torch.stack([max_T, sum_T, target_T])


def _grad_reference(
    logits_Tv: Tensor, local_T: Tensor, is_here_T: Tensor, log_sum_T: Tensor, upstream_T: Tensor, c: "Criterion",
    in_place: bool,
) -> Tensor:  # fmt: skip
    out_Tv = logits_Tv if in_place and logits_Tv.dtype == torch.float32 else None
    grad_Tv = torch.sub(logits_Tv.float(), log_sum_T[:, None], out=out_Tv).exp_()
    if c.z_loss:
        grad_Tv *= (1 + 2 * c.z_loss * log_sum_T)[:, None]
    grad_Tv.scatter_add_(-1, local_T[:, None], -c.confidence * is_here_T.to(grad_Tv.dtype)[:, None])
    if c.label_smoothing:
        grad_Tv -= c.smooth
    if c.valid_rows < grad_Tv.shape[1]:
        grad_Tv[:, c.valid_rows :] = 0
    return grad_Tv.mul_(upstream_T[:, None]).to(logits_Tv.dtype)


@dataclass(frozen=True)
class Criterion:
    """What the loss of a token is, and which part of the vocabulary this rank holds.

    The fields are the arguments of vocab_parallel_cross_entropy. Raises ValueError where label smoothing cannot know
    the size of the vocabulary.
    """

    first_row: int
    valid_rows: int
    group: dist.ProcessGroup | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    vocab_size: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.label_smoothing and self.vocab_size is None and self.ranks > 1:
            raise ValueError("label smoothing over several ranks needs vocab_size, the entries of all shards")

    @property
    def ranks(self) -> int:
        """Over how many ranks the vocabulary is split."""
        return 1 if self.group is None else self.group.size()

    @property
    def confidence(self) -> float:
        """What label smoothing leaves of the target's weight."""
        return 1.0 - self.label_smoothing

    @property
    def smooth(self) -> float:
        """The weight that label smoothing gives to every entry."""
        return self.label_smoothing / (self.vocab_size or self.valid_rows) if self.label_smoothing else 0.0

    def _local(self, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        local_T = labels_T - self.first_row
        is_here_T = (local_T >= 0) & (local_T < self.valid_rows)
        return torch.where(is_here_T, local_T, 0), is_here_T

    def losses(self, logits_Tv: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and log-sum-exp of each token, fp32 [tokens] each; three scalars a token go over the group."""
        if resolve_backend(self.backend, logits_Tv) == "torch":
            stats_3T = _stats_reference(logits_Tv, *self._local(labels_T), self)
        else:
            stats_3T = _stats(
                logits_Tv, labels_T, self.first_row, self.valid_rows, self.ignore_index, self.confidence, self.smooth
            )
        if self.ranks == 1:
            max_T, sum_T, target_T = stats_3T
            log_sum_T = max_T + sum_T.log()
        else:
            max_RT, sum_RT, target_RT = self._exchange(stats_3T).unbind(1)
            top_T, target_T = max_RT.amax(0), target_RT.sum(0)
            log_sum_T = top_T + (sum_RT * (max_RT - top_T).exp()).sum(0).log()
        losses_T = log_sum_T - target_T
        if self.z_loss:
            losses_T += self.z_loss * log_sum_T.square()
        return torch.where(labels_T == self.ignore_index, 0.0, losses_T), log_sum_T

    def _exchange(self, stats_3T: Tensor) -> Tensor:
        """All ranks' statistics, [ranks, 3, tokens]: the one exchange of this operation."""
        gathered = stats_3T.new_empty((self.ranks, *stats_3T.shape))
        all_gather(gathered.view(-1), stats_3T.view(-1), group=self.group)
        return gathered

    def gradient(
        self, logits_Tv: Tensor, labels_T: Tensor, log_sum_T: Tensor, upstream_T: Tensor, in_place: bool
    ) -> Tensor:
        """Gradient of sum(upstream_T x losses) by the logits, in their type; with in_place it takes their place."""
        upstream_T = torch.where(labels_T == self.ignore_index, 0.0, upstream_T)
        if resolve_backend(self.backend, logits_Tv) == "torch":
            grad_Tv = _grad_reference(logits_Tv, *self._local(labels_T), log_sum_T, upstream_T, self, in_place)
            return logits_Tv.copy_(grad_Tv) if in_place and grad_Tv is not logits_Tv else grad_Tv
        scalars = (self.first_row, self.valid_rows, self.confidence, self.smooth, float(self.z_loss))
        if not in_place:
            return _grad(logits_Tv, labels_T, log_sum_T, upstream_T, *scalars)
        _grad_in_place(logits_Tv, labels_T, log_sum_T, upstream_T, *scalars)
        return logits_Tv


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_Tv: Tensor, labels_T: Tensor, criterion: Criterion, in_place: bool) -> Tensor:
        losses_T, log_sum_T = criterion.losses(logits_Tv, labels_T)
        ctx.save_for_backward(logits_Tv, labels_T, log_sum_T)
        ctx.criterion, ctx.in_place = criterion, in_place
        return losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_Tv, labels_T, log_sum_T = ctx.saved_tensors
        grad_Tv = ctx.criterion.gradient(logits_Tv.detach(), labels_T, log_sum_T, grads[0], ctx.in_place)
        return grad_Tv, None, None, None


def vocab_parallel_cross_entropy(
    logits_Tv: Tensor, labels_T: Tensor, first_row: int, valid_rows: int, group: dist.ProcessGroup | None = None, *,
    label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = -100, vocab_size: int | None = None,
    in_place: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Loss of each token in nats, fp32 [tokens], from this rank's columns of the logits.

    logits_Tv is [tokens, rows of this shard]; the shard begins at row `first_row` of the vocabulary and only its first
    `valid_rows` rows are entries (the rest is padding and gets neither probability nor gradient; all may be padding).
    labels_T holds ids of the whole vocabulary, of `vocab_size` entries; a token labelled `ignore_index` has loss and
    gradient zero, and any other label outside the vocabulary is the caller's mistake, which is not looked for. One
    exchange of three fp32 scalars a token over `group`; all ranks return the same losses.

    `label_smoothing` spreads that share of the target over all entries, as torch.nn.functional.cross_entropy does
    (Szegedy et al. 2015, arXiv 1512.00567); over several ranks it needs vocab_size, or ValueError. `z_loss` times the
    square of the log-sum-exp is added (Chowdhery et al. 2022, arXiv 2204.02311).

    `in_place` lets the backward pass write the gradient over logits_Tv, which must not be needed elsewhere and then
    serves one backward pass only. `backend`: triton or torch (default: triton on a GPU, torch on a CPU).
    """
    criterion = Criterion(first_row, valid_rows, group, label_smoothing, z_loss, ignore_index, vocab_size, backend)
    if logits_Tv.stride(-1) != 1:
        logits_Tv = logits_Tv.contiguous()
    losses_T: Tensor = _VocabParallelCrossEntropy.apply(logits_Tv, labels_T.contiguous(), criterion, in_place)
    return losses_T
