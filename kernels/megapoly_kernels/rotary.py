"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapoly_kernels.launch import resolve_backend, target_of


@triton.jit
def _rotary_kernel(
    x_TNK, cos_SR, sin_SR, position_T, out_TNK, T, N, x_stride_t, x_stride_n, period, rotated,
    K: tl.constexpr, R: tl.constexpr, R_TILE: tl.constexpr, REST_TILE: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """HEADS divides N. A program takes every num_programs(1)-th tile of heads of its tokens."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    is_token = token < T
    i = tl.arange(0, R_TILE)[None, None, :]
    position = tl.load(position_T + token, mask=is_token, other=0).to(tl.int64)
    angle = position * R + i
    cos = tl.load(cos_SR + angle, mask=is_token & (i < R), other=0.0).to(tl.float32)
    sin = tl.load(sin_SR + angle, mask=is_token & (i < R), other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    token = token.to(tl.int64)
    for tile in range(tl.program_id(1), N // HEADS, tl.num_programs(1)):
        head = (tile * HEADS + tl.arange(0, HEADS))[None, :, None]
        is_rotated = head % period < rotated
        x = x_TNK + token * x_stride_t + head.to(tl.int64) * x_stride_n
        out = out_TNK + (token * N + head) * K
        if INTERLEAVED:
            k = tl.arange(0, 2 * R_TILE)[None, None, :]
            mask = is_token & (k < 2 * R)
            pair = tl.load(x + k, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pair, (TOKENS, HEADS, R_TILE, 2)))
            turned = tl.join(a * cos - b * sin, b * cos + a * sin)
            turned = tl.where(is_rotated, tl.reshape(turned, (TOKENS, HEADS, 2 * R_TILE)), pair)
            tl.store(out + k, turned.to(out_TNK.dtype.element_ty), mask=mask)
        else:
            mask = is_token & (i < R)
            a = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x + R + i, mask=mask, other=0.0).to(tl.float32)
            first = tl.where(is_rotated, a * cos - b * sin, a)
            second = tl.where(is_rotated, b * cos + a * sin, b)
            tl.store(out + i, first.to(out_TNK.dtype.element_ty), mask=mask)
            tl.store(out + R + i, second.to(out_TNK.dtype.element_ty), mask=mask)
        if K > 2 * R:
            k = 2 * R + tl.arange(0, REST_TILE)[None, None, :]
            mask = is_token & (k < K)
            tl.store(out + k, tl.load(x + k, mask=mask), mask=mask)


@torch.library.custom_op("megapoly::rotary", mutates_args=())
def _rotary(
    x_TNK: Tensor, cos_SR: Tensor, sin_SR: Tensor, position_T: Tensor, interleaved: bool, period: int, rotated: int,
    inverse: bool,
) -> Tensor:  # fmt: skip
    tokens, heads, head_dim = x_TNK.shape
    half = cos_SR.shape[1]
    x_TNK = x_TNK if x_TNK.stride(2) == 1 else x_TNK.contiguous()
    out_TNK = torch.empty((tokens, heads, head_dim), dtype=x_TNK.dtype, device=x_TNK.device)
    half_tile = triton.next_power_of_2(half)
    # 4096 channels a tile give each of 128 threads 16 bytes at a time; a narrow rotated part wants twice as many.
    rows = max(1, 4096 // triton.next_power_of_2(head_dim))
    rows = 2 * rows if rows * half_tile < 1024 else rows
    head_tile = min(rows, heads & -heads)  # the largest power of two in `heads`, so that no head needs a mask
    token_tile = rows // head_tile
    token_blocks, head_blocks = triton.cdiv(tokens, token_tile), heads // head_tile
    # The table is read once for all heads of a token, unless tokens are too few to fill the machine.
    splits = min(head_blocks, triton.cdiv(8 * target_of(x_TNK).num_sms, max(token_blocks, 1)))
    if out_TNK.numel():
        with torch.cuda.device_of(x_TNK):
            _rotary_kernel[(token_blocks, splits)](
                x_TNK, cos_SR.contiguous(), sin_SR.contiguous(), position_T.contiguous(), out_TNK, tokens, heads,
                x_TNK.stride(0), x_TNK.stride(1), period, rotated,
                K=head_dim, R=half, R_TILE=half_tile, REST_TILE=triton.next_power_of_2(max(head_dim - 2 * half, 1)),
                TOKENS=token_tile, HEADS=head_tile, INTERLEAVED=interleaved, INVERSE=inverse, num_warps=4,
            )  # fmt: skip
    return out_TNK


@_rotary.register_fake
def _(
    x_TNK: Tensor, cos_SR: Tensor, sin_SR: Tensor, position_T: Tensor, interleaved: bool, period: int, rotated: int,
    inverse: bool,
) -> Tensor:  # fmt: skip
    return x_TNK.new_empty(x_TNK.shape)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TNK: Tensor, cos_SR: Tensor, sin_SR: Tensor, position_T: Tensor, interleaved: bool, period: int,
        rotated: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(cos_SR, sin_SR, position_T)
        ctx.options = (interleaved, period, rotated)
        return _rotary(x_TNK, cos_SR, sin_SR, position_T, interleaved, period, rotated, False)

    @staticmethod
    def backward(ctx: Any, dout_TNK: Tensor) -> tuple[Tensor | None, ...]:
        cos_SR, sin_SR, position_T = ctx.saved_tensors
        dx_TNK = _rotary(dout_TNK, cos_SR, sin_SR, position_T, *ctx.options, True)
        return dx_TNK, None, None, None, None, None, None


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
    if rotated != period:
        turned_TnK, rest_TnK = x_TNK.unflatten(1, (-1, period)).split([rotated, period - rotated], dim=2)
        turned_TNK = rotary_reference(
            turned_TnK.flatten(1, 2), cos_SR, sin_SR, position_T, interleaved=interleaved
        )  # fmt: skip
        return torch.cat([turned_TNK.unflatten(1, (-1, rotated)), rest_TnK], dim=2).flatten(1, 2)
    half = cos_SR.shape[-1]
    cos, sin = (table.index_select(0, position_T)[:, None] for table in (cos_SR, sin_SR))
    turned, rest = x_TNK.to(cos.dtype).split([2 * half, x_TNK.shape[-1] - 2 * half], dim=-1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        return torch.cat([torch.stack(pair, dim=-1).flatten(-2), rest], dim=-1).to(x_TNK.dtype)
    return torch.cat([*pair, rest], dim=-1).to(x_TNK.dtype)


def rotary(
    x_TNK: Tensor, cos_SR: Tensor, sin_SR: Tensor, position_T: Tensor, *,
    interleaved: bool = False, period: int = 1, rotated: int = 1, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Rotate the first 2R channels of heads by their token's position; the others pass through. Out of place.

    x_TNK is [tokens, heads, head_dim], position_T int [tokens] rows of the table, cos_SR and sin_SR fp32
    [positions, R]. Pairs are channels i and i + R (half style: GPT-NeoX, LLaMA) or 2i and 2i + 1 (interleaved: GPT-J).
    Of every `period` heads the first `rotated` are rotated, so that one call serves a packed QKV buffer. Scaling of
    positions (linear, NTK, YaRN) lies in the table, which gets no gradient. `backend`: triton or torch (default: triton
    on a GPU).
    """
    if resolve_backend(backend, x_TNK) == "torch":
        return rotary_reference(
            x_TNK, cos_SR, sin_SR, position_T, interleaved=interleaved, period=period, rotated=rotated
        )  # fmt: skip
    return _Rotary.apply(x_TNK, cos_SR, sin_SR, position_T, interleaved, period, rotated)
