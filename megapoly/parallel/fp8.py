"""Matrix products in FP8 with one scale for each tensor (Micikevicius et al. 2022, arXiv 2209.05433).

Activations and weights are rounded to e4m3, gradients to e5m2, whose range is wider. A tensor is scaled so that its
largest entry becomes the type's largest number; the scale is taken when the tensor is used and stays on the device.
Under tensor parallelism each rank scales the part that it holds.
"""

import torch
from torch import Tensor


def fp8_product(a_TK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None, *, is_gradient: bool = False) -> Tensor:
    """a b (+ bias) in the type of a, from both rounded to FP8; sums are in fp32, for gradients without shortcuts.

    K and N must be multiples of 16 on a GPU. `is_gradient`: a is a gradient.
    """
    a, a_scale = _rounded(a_TK.contiguous(), torch.float8_e5m2 if is_gradient else torch.float8_e4m3fn)
    b, b_scale = _rounded(b_KN, torch.float8_e4m3fn)
    if b.stride(0) != 1:
        b = b.t().contiguous().t()  # the product reads its second matrix by columns
    y_TN = torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=a_TK.dtype, use_fast_accum=not is_gradient)
    return y_TN if bias_N is None else y_TN.add_(bias_N)


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in `dtype`, and the scale. What is not finite becomes NaN."""
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    scale = (largest / torch.finfo(dtype).max).clamp_(min=torch.finfo(torch.float32).tiny)
    # No entry can overflow: the quotient's own rounding is far below half a step of the type at its end.
    return (x / scale).to(dtype), scale
