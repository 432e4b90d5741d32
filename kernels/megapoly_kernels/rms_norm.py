"""RMSNorm fused with the residual add (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch import Tensor

from megapoly_kernels.launch import resolve_backend
from megapoly_kernels.norm_kernels import residual_norm


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


def _by_apex(branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The operation with apex's kernel, for comparison; no test of ours runs it, since apex must be built by hand."""
    from apex.normalization.fused_layer_norm import mixed_dtype_fused_rms_norm_affine

    if branch_TH is not None:
        residual_TH = residual_TH + branch_TH
    return mixed_dtype_fused_rms_norm_affine(residual_TH, weight_H, weight_H.shape, eps), residual_TH


def rms_norm(
    branch_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum: (normed, new residual).

    branch_TH and residual_TH are [tokens, hidden]; branch_TH None means that there is nothing to add. The new residual
    keeps residual_TH's type, normed has the weight's. `backend`: triton, torch or apex (default: triton on a GPU, torch
    on a CPU).
    """
    backend = resolve_backend(backend, residual_TH)
    if backend == "triton":
        return residual_norm(branch_TH, residual_TH, weight_H, None, eps)
    by = _by_apex if backend == "apex" else rms_norm_reference
    return by(branch_TH, residual_TH, weight_H, eps)
