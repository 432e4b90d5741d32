"""From hidden states to the loss of each token."""

from megapoly_kernels import vocab_parallel_cross_entropy
from torch import Tensor

from megapoly.model.transformer import Transformer


def token_losses(model: Transformer, normed_tH: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross entropy of each token, fp32 [batch, sequence], in nats; the same on every tensor-parallel rank."""
    shard = model.head_shard
    losses_T = vocab_parallel_cross_entropy(
        model.logits(normed_tH), labels_BS.flatten(), shard.begin, shard.end - shard.begin, model.place.tp.group
    )
    return losses_T.view_as(labels_BS)
