"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half style as in GPT-NeoX and LLaMA."""

import torch
from torch import Tensor


def rotary_table(
    positions: int, rotary_dim: int, base: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, each fp32 [positions, rotary_dim / 2]; the frequencies are base^(-2i / rotary_dim)."""
    inverse_R = base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim)
    angle_SR = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), inverse_R)
    return angle_SR.cos(), angle_SR.sin()


def rotary_reference(x_BShK: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """The operation in plain torch, computed in fp32."""
    half = cos_SR.shape[-1]
    first, second, rest = x_BShK.float().split([half, half, x_BShK.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos_SR[None, : x_BShK.shape[1], None], sin_SR[None, : x_BShK.shape[1], None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return rotated.to(x_BShK.dtype)


def rotary(x_BShK: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Rotate the first 2R channels of each head by its position; the others pass through.

    x_BShK is [batch, sequence, heads, head_dim], the table [positions >= sequence, R]. Out of place.
    """
    return rotary_reference(x_BShK, cos_SR, sin_SR)
