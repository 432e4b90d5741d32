"""Causal attention with the rotation of queries and keys fused in (FlashAttention-2, Dao 2023, arXiv 2307.08691)."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megapoly_kernels.attention_backward import launch_backward
from megapoly_kernels.attention_forward import empty_outputs, launch_forward
from megapoly_kernels.launch import resolve_backend
from megapoly_kernels.rotary import rotary


@dataclass(frozen=True)
class Sequences:
    """Where sequences begin and end in a flat run of tokens; no token sees one of another sequence.

    Either all have one `length` (which divides the tokens), or start_T and end_T, int32 [tokens], hold for each token
    the first token of its sequence and the one after its last (cu_seqlens: the borders, int32 [sequences + 1]).
    """

    length: int = 0
    start_T: Tensor | None = None
    end_T: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def packed(cls, cu_seqlens: Tensor, tokens: int) -> Self:
        """From cumulative lengths, int [sequences + 1] from 0 to tokens; waits for no GPU."""
        cu_seqlens = cu_seqlens.to(torch.int32)
        token_T = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
        number_T = torch.searchsorted(cu_seqlens, token_T, right=True)
        return cls(0, cu_seqlens[number_T - 1], cu_seqlens[number_T], cu_seqlens)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Each token's place in its sequence, int32 [tokens]."""
        token_T = torch.arange(tokens, dtype=torch.int32, device=device)
        return token_T % self.length if self.start_T is None else token_T - self.start_T


@dataclass(frozen=True)
class HeadShape:
    """The packed QKV buffer, [tokens, groups x (queries + 2) x head_dim]: each group's queries, its key, its value."""

    groups: int
    queries: int
    head_dim: int

    def split(self, qkv_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the queries [tokens, heads, head_dim], keys and values [tokens, groups, head_dim]."""
        qkv_TgnK = qkv_TF.unflatten(-1, (self.groups, self.queries + 2, self.head_dim))
        k_TgK, v_TgK = qkv_TgnK[:, :, self.queries :].unbind(2)
        return qkv_TgnK[:, :, : self.queries].flatten(1, 2), k_TgK, v_TgK


def _scores_added(
    sequences: Sequences, tokens: int, window: int | None, slopes_h: Tensor | None, like: Tensor
) -> Tensor:
    """What is added to scores, [heads or 1, tokens, tokens]: -inf where a query must not look, and ALiBi's bias."""
    token_T = torch.arange(tokens, device=like.device)
    start_T = token_T - sequences.positions(tokens, like.device)
    distance_TT = token_T[:, None] - token_T[None, :]
    is_seen_TT = (distance_TT >= 0) & (token_T[None, :] >= start_T[:, None])
    if window is not None:
        is_seen_TT &= distance_TT < window
    bias = torch.zeros(1, dtype=like.dtype, device=like.device) if slopes_h is None else -slopes_h.to(like.dtype)
    return (bias[:, None, None] * distance_TT).masked_fill(~is_seen_TT, -torch.inf)


def rotated(
    qkv_TF: Tensor, shape: HeadShape, sequences: Sequences, cos_SR: Tensor | None, sin_SR: Tensor | None,
    position_T: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    """The packed buffer with queries and keys rotated, out of place; as it is where there is no table."""
    if cos_SR is None or sin_SR is None:
        return qkv_TF
    if position_T is None:
        position_T = sequences.positions(qkv_TF.shape[0], qkv_TF.device)
    x_TNK, period = qkv_TF.unflatten(-1, (-1, shape.head_dim)), shape.queries + 2
    x_TNK = rotary(x_TNK, cos_SR, sin_SR, position_T, interleaved=interleaved, period=period, rotated=period - 1)
    return x_TNK.flatten(1)


def rotary_attention_reference(
    qkv_TF: Tensor, shape: HeadShape, sequences: Sequences, cos_SR: Tensor | None = None, sin_SR: Tensor | None = None,
    *, position_T: Tensor | None = None, interleaved: bool = False, window: int | None = None,
    alibi_slopes_h: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The operation by torch's scaled_dot_product_attention; packed sequences, windows and ALiBi by a dense mask."""
    tokens = qkv_TF.shape[0]
    qkv_TF = rotated(qkv_TF, shape, sequences, cos_SR, sin_SR, position_T, interleaved)
    length, added = sequences.length, None
    if sequences.start_T is not None or window is not None or alibi_slopes_h is not None:
        length = tokens
        added = _scores_added(sequences, tokens, window, alibi_slopes_h, qkv_TF)
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in shape.split(qkv_TF))
    out_BhSK = F.scaled_dot_product_attention(
        q, k, v, attn_mask=added, is_causal=added is None, scale=scale, enable_gqa=shape.queries > 1
    )
    return out_BhSK.transpose(1, 2).flatten(0, 1)


# groups, queries, head_dim, length of the sequences (0: packed), window (0: none), interleaved, scale
Options = tuple[int, int, int, int, int, bool, float]


@torch.library.custom_op("megapoly::attention_forward", mutates_args=())
def _forward(
    qkv_TF: Tensor, slopes_h: Tensor | None, start_T: Tensor | None, groups: int, queries: int, head_dim: int,
    length: int, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch_forward(
        qkv_TF, None, None, None, start_T, slopes_h, groups, queries, head_dim, length, window, False, scale
    )  # fmt: skip


@_forward.register_fake
def _(
    qkv_TF: Tensor, slopes_h: Tensor | None, start_T: Tensor | None, groups: int, queries: int, head_dim: int,
    length: int, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_outputs(qkv_TF, groups * queries, head_dim)


@torch.library.custom_op("megapoly::rotary_attention_forward", mutates_args=("qkv_TF",))
def _rotary_forward(
    qkv_TF: Tensor, cos_SR: Tensor, sin_SR: Tensor, position_T: Tensor | None, start_T: Tensor | None,
    slopes_h: Tensor | None, groups: int, queries: int, head_dim: int, length: int, window: int, interleaved: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch_forward(
        qkv_TF, cos_SR, sin_SR, position_T, start_T, slopes_h, groups, queries, head_dim, length, window, interleaved,
        scale,
    )  # fmt: skip


@_rotary_forward.register_fake
def _(
    qkv_TF: Tensor, cos_SR: Tensor, sin_SR: Tensor, position_T: Tensor | None, start_T: Tensor | None,
    slopes_h: Tensor | None, groups: int, queries: int, head_dim: int, length: int, window: int, interleaved: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_outputs(qkv_TF, groups * queries, head_dim)


@torch.library.custom_op("megapoly::attention_backward", mutates_args=())
def _backward(
    d_out_ThK: Tensor, qkv_TF: Tensor, out_ThK: Tensor, lse_hT: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None,
    position_T: Tensor | None, start_T: Tensor | None, end_T: Tensor | None, slopes_h: Tensor | None,
    groups: int, queries: int, head_dim: int, length: int, window: int, interleaved: bool, scale: float,
) -> Tensor:  # fmt: skip
    return launch_backward(
        d_out_ThK, qkv_TF, out_ThK, lse_hT, cos_SR, sin_SR, position_T, start_T, end_T, slopes_h,
        groups, queries, head_dim, length, window, interleaved, scale,
    )  # fmt: skip


@_backward.register_fake
def _(d_out_ThK: Tensor, qkv_TF: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv_TF)


class _RotaryAttention(torch.autograd.Function):
    """With a table it returns the buffer too, whose queries and keys are rotated now: it was changed in place."""

    @staticmethod
    def forward(
        ctx: Any, qkv_TF: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None, position_T: Tensor | None,
        start_T: Tensor | None, end_T: Tensor | None, slopes_h: Tensor | None, options: Options,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        groups, queries, head_dim, length, window, interleaved, scale = options
        is_rotated = cos_SR is not None and sin_SR is not None
        if is_rotated:
            out_ThK, lse_hT = _rotary_forward(
                qkv_TF, cos_SR, sin_SR, position_T, start_T, slopes_h,
                groups, queries, head_dim, length, window, interleaved, scale,
            )  # fmt: skip
            ctx.mark_dirty(qkv_TF)
        else:
            out_ThK, lse_hT = _forward(qkv_TF, slopes_h, start_T, groups, queries, head_dim, length, window, scale)
        ctx.save_for_backward(
            qkv_TF, out_ThK, lse_hT, cos_SR, sin_SR, position_T, start_T, end_T, slopes_h
        )  # fmt: skip
        ctx.options = options
        return (out_ThK, qkv_TF) if is_rotated else (out_ThK,)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_qkv_TF = _backward(grads[0], *ctx.saved_tensors, *ctx.options)
        return d_qkv_TF, None, None, None, None, None, None, None


def _flash_attention(
    qkv_TF: Tensor, shape: HeadShape, sequences: Sequences, cos_SR: Tensor | None, sin_SR: Tensor | None,
    position_T: Tensor | None, interleaved: bool, window: int | None, slopes_h: Tensor | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """The operation by the flash-attn package; the rotation is our stand-alone kernel's."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    tokens = qkv_TF.shape[0]
    q, k, v = shape.split(rotated(qkv_TF, shape, sequences, cos_SR, sin_SR, position_T, interleaved))
    limits = {
        "causal": True, "window_size": (-1 if window is None else window - 1, 0), "alibi_slopes": slopes_h,
        "softmax_scale": scale,
    }  # fmt: skip
    if sequences.start_T is None:
        batch = (x.unflatten(0, (-1, sequences.length)) for x in (q, k, v))
        return flash_attn_func(*batch, **limits).flatten(0, 1)
    cu_seqlens = sequences.cu_seqlens
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, tokens, tokens, **limits)


def rotary_attention(
    qkv_TF: Tensor, shape: HeadShape, sequences: Sequences, cos_SR: Tensor | None = None, sin_SR: Tensor | None = None,
    *, position_T: Tensor | None = None, interleaved: bool = False, window: int | None = None,
    alibi_slopes_h: Tensor | None = None, scale: float | None = None, in_place: bool = False,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Causal softmax attention within each sequence, from the packed QKV projection.

    qkv_TF is laid out as `shape` says; query head h belongs to key/value group h // queries (GQA, Ainslie et al. 2023,
    arXiv 2305.13245). With a table (fp32 [positions, rotary_dim / 2] each) queries and keys are rotated by position_T
    (default: the place in the sequence); half style, or interleaved pairs. `scale` multiplies the products of queries
    and keys (default head_dim^-1/2; muP's is 1/head_dim, Yang et al. 2022, arXiv 2203.03466). `window`: a query sees
    so many tokens, its own included. `alibi_slopes_h`, fp32 [heads]: slope x distance is subtracted from the scores
    (Press et al. 2022, arXiv 2108.12409). Softmax in fp32; the backward pass has no atomics and is deterministic.
    Returns [tokens, heads, head_dim]. Raises ValueError where sequences are longer than the table.

    No position may lie beyond the table; of packed sequences that is not looked for, since it would wait for the GPU.
    `in_place` lets the kernel leave the rotated queries and keys in qkv_TF, which must not be needed elsewhere, nor be
    a leaf or a view.
    `backend`: triton, sdpa or flash_attn (default: triton on a GPU, sdpa on a CPU).
    """
    if resolve_backend(backend, qkv_TF) in ("sdpa", "torch"):
        return rotary_attention_reference(
            qkv_TF, shape, sequences, cos_SR, sin_SR, position_T=position_T, interleaved=interleaved, window=window,
            alibi_slopes_h=alibi_slopes_h, scale=scale,
        )  # fmt: skip
    if cos_SR is not None and position_T is None and sequences.length > cos_SR.shape[0]:
        raise ValueError(
            f"sequences of {sequences.length} tokens need as many rows of the table, not {cos_SR.shape[0]}"
        )
    if backend == "flash_attn":
        return _flash_attention(
            qkv_TF, shape, sequences, cos_SR, sin_SR, position_T, interleaved, window, alibi_slopes_h, scale
        )  # fmt: skip
    is_rotated = cos_SR is not None
    if is_rotated and not (in_place and qkv_TF.is_contiguous()):
        qkv_TF = qkv_TF.clone(memory_format=torch.contiguous_format)
    tables = (cos_SR, sin_SR, position_T, sequences.start_T, sequences.end_T, alibi_slopes_h)
    out_ThK, *_ = _RotaryAttention.apply(
        qkv_TF.contiguous(), *(None if x is None else x.contiguous() for x in tables),
        (shape.groups, shape.queries, shape.head_dim, sequences.length, window or 0, interleaved,
         shape.head_dim**-0.5 if scale is None else scale),
    )  # fmt: skip
    return out_ThK
