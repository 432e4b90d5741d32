"""RMSNorm fused with the residual add (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch import Tensor


def rms_norm_reference(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The operation in plain torch; statistics in fp32 whatever the types."""
    if branch_TH is not None:
        residual_TH = residual_TH + branch_TH
    x_TH = residual_TH.float()
    normed_TH = x_TH * torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + eps)
    # LLaMA's order: the normalised value is rounded to the parameters' type before the weight is applied.
    return weight_H * normed_TH.to(weight_H.dtype), residual_TH


def rms_norm(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum: (normed, new residual).

    branch_TH and residual_TH are [tokens, hidden]; branch_TH None means that there is nothing to add. The new residual
    keeps residual_TH's type, normed has the weight's.
    """
    return rms_norm_reference(branch_TH, residual_TH, weight_H, eps)
