"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary_table(
    positions: int, rotary_dim: int, base: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, each fp32 [positions, rotary_dim / 2]; the frequencies are base^(-2i / rotary_dim)."""
    inverse_R = base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim)
    angle_SR = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), inverse_R)
    return angle_SR.cos(), angle_SR.sin()


def rotary_reference(
    x_TNK: Tensor, cos_SR: Tensor, sin_SR: Tensor, position_T: Tensor, *,
    interleaved: bool = False, period: int = 1, rotated: int = 1,
) -> Tensor:  # fmt: skip
    """The operation in plain torch, computed in fp32."""
    half = cos_SR.shape[-1]
    cos, sin = cos_SR[position_T.long(), None], sin_SR[position_T.long(), None]
    turned, rest = x_TNK.to(cos.dtype).split([2 * half, x_TNK.shape[-1] - 2 * half], dim=-1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    out_TNK = torch.cat([turned, rest], dim=-1).to(x_TNK.dtype)
    if rotated == period:
        return out_TNK
    is_rotated_N = torch.arange(x_TNK.shape[1], device=x_TNK.device) % period < rotated
    return torch.where(is_rotated_N[:, None], out_TNK, x_TNK)


def rotary(
    x_TNK: Tensor, cos_SR: Tensor, sin_SR: Tensor, position_T: Tensor, *,
    interleaved: bool = False, period: int = 1, rotated: int = 1, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Rotate the first 2R channels of heads by their token's position; the others pass through. Out of place.

    x_TNK is [tokens, heads, head_dim], position_T int [tokens] rows of the table, cos_SR and sin_SR fp32
    [positions, R]. Pairs are channels i and i + R (half style: GPT-NeoX, LLaMA) or 2i and 2i + 1 (interleaved: GPT-J).
    Of every `period` heads the first `rotated` are rotated, so that one call serves a packed QKV buffer. Scaling of
    positions (linear, NTK, YaRN) lies in the table.
    """
    return rotary_reference(
        x_TNK, cos_SR, sin_SR, position_T, interleaved=interleaved, period=period, rotated=rotated
    )  # fmt: skip
