"""Activations of the MLP: GELU with its bias (Hendrycks and Gimpel 2016), SwiGLU and GeGLU (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor


def bias_gelu_reference(x_TF: Tensor, bias_F: Tensor | None, approximate: str) -> Tensor:
    """The operation in plain torch."""
    return F.gelu(x_TF if bias_F is None else x_TF + bias_F, approximate=approximate)


def bias_gelu(x_TF: Tensor, bias_F: Tensor | None, approximate: str, backend: str | None = None) -> Tensor:
    """GELU of x + bias, [tokens, ffn]; approximate is `tanh` (Megatron-LM, GPT-2) or `none` (erf, GPT-NeoX)."""
    return bias_gelu_reference(x_TF, bias_F, approximate)


def gated_activation_reference(x_T2F: Tensor, bias_2F: Tensor | None, kind: str) -> Tensor:
    """The operation in plain torch."""
    gate_TF, linear_TF = (x_T2F if bias_2F is None else x_T2F + bias_2F).unbind(-2)
    return (F.silu(gate_TF) if kind == "swiglu" else F.gelu(gate_TF)) * linear_TF


def gated_activation(x_T2F: Tensor, bias_2F: Tensor | None, kind: str, backend: str | None = None) -> Tensor:
    """act(gate) x linear for x_T2F [tokens, 2, ffn] with the gate first; kind is `swiglu` or `geglu` (exact GELU)."""
    return gated_activation_reference(x_T2F, bias_2F, kind)
