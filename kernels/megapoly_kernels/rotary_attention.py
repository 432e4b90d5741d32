"""Causal attention with the rotation of queries and keys fused in (FlashAttention-2, Dao 2023, arXiv 2307.08691)."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megapoly_kernels.launch import resolve_backend
from megapoly_kernels.rotary import rotary


@dataclass(frozen=True)
class Sequences:
    """Where sequences begin and end in a flat run of tokens; no token sees one of another sequence.

    Either all have one `length` (which divides the tokens), or start_T and end_T, int32 [tokens], hold for each token
    the first token of its sequence and the one after its last.
    """

    length: int = 0
    start_T: Tensor | None = None
    end_T: Tensor | None = None

    @classmethod
    def packed(cls, cu_seqlens: Tensor, tokens: int) -> Self:
        """From cumulative lengths, int [sequences + 1] from 0 to tokens; waits for no GPU."""
        cu_seqlens = cu_seqlens.to(torch.int32)
        token_T = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
        number_T = torch.searchsorted(cu_seqlens, token_T, right=True)
        return cls(0, cu_seqlens[number_T - 1], cu_seqlens[number_T])

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


def rotary_attention_reference(
    qkv_TF: Tensor, shape: HeadShape, sequences: Sequences, cos_SR: Tensor | None = None, sin_SR: Tensor | None = None,
    *, position_T: Tensor | None = None, interleaved: bool = False, window: int | None = None,
    alibi_slopes_h: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The operation by torch's scaled_dot_product_attention; packed sequences, windows and ALiBi by a dense mask."""
    tokens = qkv_TF.shape[0]
    if cos_SR is not None and sin_SR is not None:
        if position_T is None:
            position_T = sequences.positions(tokens, qkv_TF.device)
        x_TNK = qkv_TF.unflatten(-1, (-1, shape.head_dim))
        period = shape.queries + 2
        x_TNK = rotary(x_TNK, cos_SR, sin_SR, position_T, interleaved=interleaved, period=period, rotated=period - 1)
        qkv_TF = x_TNK.flatten(1)
    length, added = sequences.length, None
    if sequences.start_T is not None or window is not None or alibi_slopes_h is not None:
        length = tokens
        added = _scores_added(sequences, tokens, window, alibi_slopes_h, qkv_TF)
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in shape.split(qkv_TF))
    out_BhSK = F.scaled_dot_product_attention(
        q, k, v, attn_mask=added, is_causal=added is None, enable_gqa=shape.queries > 1
    )
    return out_BhSK.transpose(1, 2).flatten(0, 1)


def rotary_attention(
    qkv_TF: Tensor, shape: HeadShape, sequences: Sequences, cos_SR: Tensor | None = None, sin_SR: Tensor | None = None,
    *, position_T: Tensor | None = None, interleaved: bool = False, window: int | None = None,
    alibi_slopes_h: Tensor | None = None, in_place: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Causal softmax attention within each sequence, scaled by head_dim^-1/2, from the packed QKV projection.

    qkv_TF is laid out as `shape` says; query head h belongs to key/value group h // queries (GQA, Ainslie et al. 2023,
    arXiv 2305.13245). With a table (fp32 [positions, rotary_dim / 2] each) queries and keys are rotated by position_T
    (default: the place in the sequence); half style, or interleaved pairs. `window`: a query sees so many tokens, its
    own included. `alibi_slopes_h`, fp32 [heads]: slope x distance is subtracted from the scores (Press et al. 2022,
    arXiv 2108.12409). Softmax in fp32. Returns [tokens, heads, head_dim].

    `in_place` lets the kernel leave the rotated queries and keys in qkv_TF, which must not be needed elsewhere.
    `backend`: triton, sdpa or flash_attn (default: triton on a GPU, sdpa on a CPU).
    """
    if resolve_backend(backend, qkv_TF) in ("sdpa", "torch"):
        return rotary_attention_reference(
            qkv_TF, shape, sequences, cos_SR, sin_SR, position_T=position_T, interleaved=interleaved, window=window,
            alibi_slopes_h=alibi_slopes_h,
        )  # fmt: skip
    raise NotImplementedError(backend)
