"""From hidden states to the loss of each token."""

import torch
from megapoly_kernels import linear_cross_entropy, vocab_parallel_cross_entropy
from torch import Tensor

from megapoly.model.head import SharedHead
from megapoly.model.transformer import Transformer
from megapoly.parallel.linear import column_parallel_linear
from megapoly.parallel.tensor import shard_of


def masked_losses(
    model: Transformer | SharedHead, normed_tH: Tensor, labels_BS: Tensor, mask_BS: Tensor, num_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """What a micro-batch adds to the mean loss over num_tokens, and the cross entropy of each unmasked token.

    The objective is what backward starts from; it must not be scaled. The losses are in nats, fp32 [batch, sequence],
    zero where the mask is, without gradient, and the same on every tensor-parallel rank.
    """
    backend, weight, place = model.backends.loss, model.head_weight, model.place
    shard, group = shard_of(weight), place.tp.group
    labels_T, valid_rows = labels_BS.flatten(), shard.end - shard.begin
    if backend == "fused_linear":
        objective, losses_T = linear_cross_entropy(
            normed_tH, weight, labels_T, mask_BS.flatten() / num_tokens, shard.begin, valid_rows,
            group=group, sequence_parallel=place.sequence_parallel, main_grad=getattr(weight, "main_grad", None),
        )  # fmt: skip
        if hasattr(weight, "main_grad") and weight.requires_grad and torch.is_grad_enabled():
            weight.grad_added()  # type: ignore[attr-defined]  # the gradient was made and added on the way forward
        return objective, losses_T.view_as(mask_BS) * mask_BS
    logits_Tv = column_parallel_linear(normed_tH, weight, None, place)
    losses_T = vocab_parallel_cross_entropy(
        logits_Tv, labels_T, shard.begin, valid_rows, group, in_place=True, backend=backend
    )
    losses_BS = losses_T.view_as(mask_BS) * mask_BS
    return losses_BS.sum() / num_tokens, losses_BS.detach()
