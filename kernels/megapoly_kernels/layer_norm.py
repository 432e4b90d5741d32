"""LayerNorm fused with the residual add (Ba, Kiros, Hinton 2016, arXiv 1607.06450)."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The operation in plain torch; statistics in fp32 whatever the types."""
    if branch_TH is not None:
        residual_TH = residual_TH + branch_TH
    normed_TH = F.layer_norm(residual_TH.float(), (residual_TH.shape[-1],), weight_H.float(), bias_H.float(), eps)
    return normed_TH.to(weight_H.dtype), residual_TH


def layer_norm(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a branch to the residual stream and normalise the sum: (normed, new residual).

    branch_TH and residual_TH are [tokens, hidden]; branch_TH None means that there is nothing to add. The new residual
    keeps residual_TH's type (fp32 under --fp32-residual-connection, PolyLM's recipe), normed has the weight's.
    """
    return layer_norm_reference(branch_TH, residual_TH, weight_H, bias_H, eps)
