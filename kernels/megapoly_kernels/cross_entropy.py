"""Cross entropy over a vocabulary that is split over tensor-parallel ranks (Shoeybi et al. 2019, arXiv 1909.08053)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed it; 2.11 knows the older name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _exchange(stats_3T: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' statistics, [ranks, 3, tokens]: the one exchange of this operation."""
    if group is None or group.size() == 1:
        return stats_3T[None]
    gathered = stats_3T.new_empty((group.size(), *stats_3T.shape))
    _all_gather(gathered.view(-1), stats_3T.view(-1), group=group)
    return gathered


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_Tv: Tensor, labels_T: Tensor, first_row: int, valid_rows: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        logits_Tv = logits_Tv.float()
        local_T = labels_T - first_row
        is_here_T = (local_T >= 0) & (local_T < valid_rows)
        local_T = torch.where(is_here_T, local_T, 0)
        valid_Tv = logits_Tv[:, :valid_rows]
        if valid_rows:
            max_T = valid_Tv.amax(-1)
            sum_T = (valid_Tv - max_T[:, None]).exp().sum(-1)
            target_T = torch.where(is_here_T, logits_Tv.gather(-1, local_T[:, None])[:, 0], 0.0)
        else:  # a shard that holds nothing but padding
            max_T = logits_Tv.new_full((len(logits_Tv),), -torch.inf)
            sum_T, target_T = torch.zeros_like(max_T), torch.zeros_like(max_T)
        max_RT, sum_RT, target_RT = _exchange(torch.stack([max_T, sum_T, target_T]), group).unbind(1)
        top_T = max_RT.amax(0)
        log_sum_T = top_T + (sum_RT * (max_RT - top_T).exp()).sum(0).log()
        ctx.save_for_backward(logits_Tv, log_sum_T, local_T, is_here_T)
        ctx.valid_rows = valid_rows
        return log_sum_T - target_RT.sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_T,) = grads
        logits_Tv, log_sum_T, local_T, is_here_T = ctx.saved_tensors
        grad_Tv = (logits_Tv - log_sum_T[:, None]).exp_()
        grad_Tv.scatter_add_(-1, local_T[:, None], -is_here_T.to(grad_Tv.dtype)[:, None])
        grad_Tv[:, ctx.valid_rows :] = 0
        return grad_Tv.mul_(grad_T[:, None]), None, None, None, None


def vocab_parallel_cross_entropy(
    logits_Tv: Tensor, labels_T: Tensor, first_row: int, valid_rows: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Loss of each token, fp32 [tokens], from this rank's columns of the logits.

    logits_Tv is [tokens, rows of this shard]; the shard begins at row `first_row` of the vocabulary and only its first
    `valid_rows` rows are entries (the rest is padding and gets neither probability nor gradient). labels_T holds ids of
    the whole vocabulary. One exchange of three fp32 scalars a token over `group`; all ranks return the same loss.
    """
    loss: Tensor = _VocabParallelCrossEntropy.apply(logits_Tv, labels_T, first_row, valid_rows, group)
    return loss
