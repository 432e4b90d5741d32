"""Sums of matrix products in fp32: how weight gradients reach their main gradient."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def _adds_into_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of `dtype` to an fp32 matrix in one go (its first versions refused that)."""
    a, out = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((out == 16).all())


def accumulate_(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """out += a b, where out is fp32 and the product is not rounded to the type of a and b on the way."""
    if not a_MK.is_cuda or a_MK.dtype == torch.float32:
        out_MN.addmm_(a_MK.float(), b_KN.float())
    elif _adds_into_fp32(a_MK.dtype, a_MK.device):
        torch.addmm(out_MN, a_MK, b_KN, out_dtype=torch.float32, out=out_MN)
    else:  # by blocks of rows, so that no second fp32 matrix of this size is held
        rows = max(1, 2**25 // b_KN.shape[1])
        for out, a in zip(out_MN.split(rows), a_MK.split(rows), strict=True):
            out.add_(torch.mm(a, b_KN, out_dtype=torch.float32))
