"""LayerNorm fused with the residual add (Ba, Kiros, Hinton 2016, arXiv 1607.06450)."""

import torch.nn.functional as F
from torch import Tensor

from megapoly_kernels.launch import resolve_backend
from megapoly_kernels.norm_kernels import residual_norm


def layer_norm_reference(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The operation in plain torch; statistics in fp32 whatever the types."""
    if branch_TH is not None:
        residual_TH = residual_TH + branch_TH
    normed_TH = F.layer_norm(residual_TH.float(), (residual_TH.shape[-1],), weight_H.float(), bias_H.float(), eps)
    return normed_TH.to(weight_H.dtype), residual_TH


def _by_apex(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The operation with apex's kernel, for comparison; no test of ours runs it, since apex must be built by hand."""
    from apex.normalization.fused_layer_norm import mixed_dtype_fused_layer_norm_affine

    if branch_TH is not None:
        residual_TH = residual_TH + branch_TH
    return mixed_dtype_fused_layer_norm_affine(residual_TH, weight_H, bias_H, weight_H.shape, eps), residual_TH


def layer_norm(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a branch to the residual stream and normalise the sum: (normed, new residual).

    branch_TH and residual_TH are [tokens, hidden]; branch_TH None means that there is nothing to add. The new residual
    keeps residual_TH's type (fp32 under --fp32-residual-connection, PolyLM's recipe), normed has the weight's.
    `backend`: triton, torch or apex (default: triton on a GPU, torch on a CPU).
    """
    by = {"triton": residual_norm, "apex": _by_apex, "torch": layer_norm_reference}
    return by[resolve_backend(backend, residual_TH)](branch_TH, residual_TH, weight_H, bias_H, eps)
