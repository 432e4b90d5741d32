"""Causal attention of a part of each sequence's queries to all of its keys: what one context-parallel rank computes.

Keys and values are gathered from all ranks (Llama 3, Dubey et al. 2024, arXiv 2407.21783, section 3.3.2): with few
key/value heads they are small beside the activations, and documents of any shape need nothing but a mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from megapoly_kernels.attention_backward import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
    attention_delta_kernel,
    backward_tiles,
)
from megapoly_kernels.attention_forward import (
    LOG2_E,
    Tiles,
    attention_forward_kernel,
    can_use_tma,
    empty_outputs,
    forward_tiles,
    head_options,
    precision_of,
    source_of,
)
from megapoly_kernels.launch import resolve_backend, target_of
from megapoly_kernels.rotary_attention import HeadShape, Sequences, rotated

REFERENCE_ROWS = 512  # queries whose mask the reference builds at once


class Exchange(Protocol):
    """How ranks share keys and values; both start a transfer and return what waits for its result."""

    def gather(self, x_tF: Tensor) -> Callable[[], Tensor]:
        """The rows of all ranks in the order of the flat tokens, from this rank's."""

    def scatter(self, x_TF: Tensor) -> Callable[[], Tensor]:
        """The sum over ranks of this rank's rows, from what each has for all tokens: the gather's transpose."""


@dataclass(frozen=True)
class LocalChunks:
    """The queries of a rank that holds some of the equal chunks of each of `batch` sequences of `length` tokens.

    `chunks` are the numbers of these chunks, ascending, out of `num_chunks`. The t flat local tokens lie in the order
    [batch, chunks, tokens of a chunk], the T keys in the order [batch, length]. Row i is token own_t[i] of the T and
    sees the keys from first_t[i] to itself; key j is seen by rows from begin_T[j] to before end_T[j]; all int32.
    `position_t` is the position of each local token: its place in its document, or what was put there.
    """

    batch: int
    length: int
    chunks: tuple[int, ...]
    num_chunks: int
    is_packed: bool
    own_t: Tensor
    first_t: Tensor
    position_t: Tensor
    begin_T: Tensor
    end_T: Tensor

    @classmethod
    def of(
        cls, sequences: Sequences, batch: int, length: int, chunks: tuple[int, ...], num_chunks: int,
        device: torch.device,
    ) -> Self:  # fmt: skip
        """From the `sequences` that all batch x length tokens hold: whole ones of `length`, or packed documents.

        Packed documents must not cross from one of the batch's rows into the next.
        """
        token_T = torch.arange(batch * length, dtype=torch.int32, device=device)
        token_BCt = token_T.view(batch, num_chunks, length // num_chunks)
        own_t = torch.stack([token_BCt[:, chunk] for chunk in chunks], 1).flatten()
        start_T = token_T - sequences.positions(len(token_T), device)
        after_T = start_T + length if sequences.end_T is None else sequences.end_T
        return cls(
            batch, length, chunks, num_chunks, sequences.start_T is not None, own_t,
            first_t=start_T.index_select(0, own_t),
            position_t=own_t - start_T.index_select(0, own_t),
            begin_T=torch.searchsorted(own_t, token_T, out_int32=True),
            end_T=torch.searchsorted(own_t, after_T, out_int32=True),
        )  # fmt: skip

    def positions(self, _tokens: int, _device: torch.device) -> Tensor:
        """Each local token's place in its document, int32: as Sequences.positions."""
        return self.position_t

    @property
    def chunk_length(self) -> int:
        """Tokens of one chunk."""
        return self.length // self.num_chunks

    def is_aligned(self, tiles: Tiles) -> bool:
        """Whether no tile holds tokens of two chunks, and no key tile has a key that a later query must not see."""
        return not self.is_packed and self.chunk_length % tiles.m == 0 and self.chunk_length % tiles.n == 0


def _split(qkv_tF: Tensor, shape: HeadShape) -> tuple[Tensor, Tensor]:
    """Views of the queries, [tokens, groups, queries, head_dim], and of keys and values, [tokens, groups, 2, ..]."""
    q, kv = qkv_tF.unflatten(-1, (shape.groups, shape.queries + 2, shape.head_dim)).split([shape.queries, 2], 2)
    return q, kv


def _keys_of(qkv_tF: Tensor, shape: HeadShape) -> Tensor:
    """A copy of the keys and values, [tokens, groups x 2 x head_dim]."""
    return _split(qkv_tF, shape)[1].flatten(1).contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_tF: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(kv_tF)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.scatter(grads[0])(), None


def _attend_densely(
    q_BthK: Tensor,
    k_BSgK: Tensor,
    v_BSgK: Tensor,
    own_Bt: Tensor,
    first_Bt: Tensor,
    begin: int,
    scale: float | None,
) -> Tensor:
    """A chunk's queries, from token `begin` of their sequences, by scaled_dot_product_attention with dense masks."""
    parts = []
    for row in range(0, q_BthK.shape[1], REFERENCE_ROWS):
        rows = slice(row, row + REFERENCE_ROWS)
        end = min(begin + row + REFERENCE_ROWS, k_BSgK.shape[1])
        key_S = torch.arange(end, dtype=torch.int32, device=q_BthK.device)
        is_seen_BtS = (key_S <= own_Bt[:, rows, None]) & (key_S >= first_Bt[:, rows, None])
        q, k, v = (x.transpose(1, 2) for x in (q_BthK[:, rows], k_BSgK[:, :end], v_BSgK[:, :end]))
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=is_seen_BtS[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)
        )
    return torch.cat(parts, 1)


def _by_chunks(
    qkv_tF: Tensor, kv_TF: Tensor, shape: HeadShape, local: LocalChunks, scale: float | None, is_flash: bool
) -> Tensor:
    """The operation chunk by chunk, each with the keys up to its end: by torch, or by the flash-attn package."""
    q_tgnK, _ = _split(qkv_tF, shape)
    q_BCthK = q_tgnK.flatten(1, 2).unflatten(0, (local.batch, len(local.chunks), -1))
    kv_BSgnK = kv_TF.unflatten(0, (local.batch, -1)).unflatten(-1, (shape.groups, 2, shape.head_dim))
    base_B11 = torch.arange(local.batch, dtype=torch.int32, device=qkv_tF.device)[:, None, None] * local.length
    own_BCt, first_BCt = (x.view(q_BCthK.shape[:3]) - base_B11 for x in (local.own_t, local.first_t))
    outputs = []
    for i, chunk in enumerate(local.chunks):
        k_BSgK, v_BSgK = kv_BSgnK[:, : (chunk + 1) * local.chunk_length].unbind(3)
        if is_flash:
            from flash_attn import flash_attn_func

            # With fewer queries than keys its causal mask ends at the last of both.
            outputs.append(flash_attn_func(q_BCthK[:, i], k_BSgK, v_BSgK, causal=True, softmax_scale=scale))
        else:
            begin = chunk * local.chunk_length
            outputs.append(_attend_densely(q_BCthK[:, i], k_BSgK, v_BSgK, own_BCt[:, i], first_BCt[:, i], begin, scale))
    return torch.stack(outputs, 1).flatten(0, 2)


def launch_forward(
    qkv_tF: Tensor, kv_TF: Tensor, shape: HeadShape, local: LocalChunks, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [rows, heads, head_dim], log-sum-exp of the scaled scores, base 2, fp32 [heads, rows])."""
    rows, heads = qkv_tF.shape[0], shape.groups * shape.queries
    out_thK, lse_ht = empty_outputs(qkv_tF, heads, shape.head_dim)
    options = head_options(shape.head_dim, shape.queries, None, False, local.first_t, None)
    tiles = forward_tiles(target_of(qkv_tF).arch, qkv_tF.dtype, options["BLOCK_D"])
    tma = can_use_tma(kv_TF, shape.head_dim)
    with torch.cuda.device_of(qkv_tF):
        attention_forward_kernel[(triton.cdiv(rows, tiles.m), heads)](
            qkv_tF, source_of(kv_TF, tiles.n, shape.head_dim, tma), out_thK, lse_ht, None, None, None, local.first_t,
            None, qkv_tF.stride(0), rows, 0, 0, scale * LOG2_E.value,
            LEAD=not local.is_aligned(tiles), WINDOWED=False, ALIBI=False, TMA=tma,
            PRECISION=precision_of(qkv_tF.dtype), BLOCK_M=tiles.m, BLOCK_N=tiles.n, own=local.own_t,
            kv_stride=kv_TF.stride(0), keys=kv_TF.shape[0], CONTEXT=True,
            num_warps=tiles.warps, num_stages=tiles.stages, **options,
        )  # fmt: skip
    return out_thK, lse_ht


def launch_delta(out_thK: Tensor, d_out_thK: Tensor, lse_ht: Tensor) -> Tensor:
    """Row sums of the output x its gradient, fp32 [heads, rows]."""
    delta_ht = torch.empty_like(lse_ht)
    rows, heads, head_dim = out_thK.shape
    block_d = max(16, triton.next_power_of_2(head_dim))
    with torch.cuda.device_of(out_thK):
        attention_delta_kernel[(triton.cdiv(rows * heads * block_d, 4096),)](
            out_thK, d_out_thK, delta_ht, rows * heads,
            D=head_dim, BLOCK_D=block_d, HEADS=heads, ROWS=4096 // block_d, num_warps=4,
        )  # fmt: skip
    return delta_ht


def launch_keys(
    d_out_tF: Tensor, qkv_tF: Tensor, kv_TF: Tensor, lse_ht: Tensor, delta_ht: Tensor, shape: HeadShape,
    local: LocalChunks, scale: float,
) -> Tensor:  # fmt: skip
    """What this rank's queries give to the gradient of all keys and values, [keys, groups x 2 x head_dim]."""
    rows, keys, d_kv_TF = qkv_tF.shape[0], kv_TF.shape[0], torch.empty_like(kv_TF)
    options = head_options(shape.head_dim, shape.queries, None, False, local.begin_T, None)
    tiles, _ = backward_tiles(target_of(qkv_tF).arch, qkv_tF.dtype, options["BLOCK_D"])
    tma = can_use_tma(qkv_tF, shape.head_dim) and can_use_tma(d_out_tF, shape.head_dim) and rows % 4 == 0
    with torch.cuda.device_of(qkv_tF):
        attention_backward_keys_kernel[(triton.cdiv(keys, tiles.n), shape.groups)](
            kv_TF, source_of(qkv_tF, tiles.m, shape.head_dim, tma),
            source_of(d_out_tF, tiles.m, shape.head_dim, tma), d_kv_TF,
            source_of(lse_ht, 1, tiles.m, tma), source_of(delta_ht, 1, tiles.m, tma), None, None, None,
            local.begin_T, local.end_T, None, kv_TF.stride(0), d_out_tF.stride(0), keys, 0, 0,
            scale * LOG2_E.value, TAIL=not local.is_aligned(tiles), WINDOWED=False, ALIBI=False,
            TMA=tma, PRECISION=precision_of(qkv_tF.dtype), BLOCK_M=tiles.m, BLOCK_N=tiles.n,
            q_stride=qkv_tF.stride(0), rows=rows, CONTEXT=True,
            num_warps=tiles.warps, num_stages=tiles.stages, **options,
        )  # fmt: skip
    return d_kv_TF


def launch_queries_(
    d_qkv_tF: Tensor, d_out_tF: Tensor, qkv_tF: Tensor, kv_TF: Tensor, lse_ht: Tensor, delta_ht: Tensor,
    shape: HeadShape, local: LocalChunks, scale: float,
) -> None:  # fmt: skip
    """Write the queries' part of the gradient of the packed buffer."""
    options = head_options(shape.head_dim, shape.queries, None, False, local.first_t, None)
    _, tiles = backward_tiles(target_of(qkv_tF).arch, qkv_tF.dtype, options["BLOCK_D"])
    rows, tma = qkv_tF.shape[0], can_use_tma(kv_TF, shape.head_dim)
    with torch.cuda.device_of(qkv_tF):
        attention_backward_queries_kernel[(triton.cdiv(rows, tiles.m), shape.groups * shape.queries)](
            qkv_tF, source_of(kv_TF, tiles.n, shape.head_dim, tma), d_out_tF, d_qkv_tF, lse_ht, delta_ht,
            None, None, None, local.first_t, None, qkv_tF.stride(0), d_out_tF.stride(0), rows, 0, 0,
            scale * LOG2_E.value, LEAD=not local.is_aligned(tiles), WINDOWED=False, ALIBI=False,
            TMA=tma, PRECISION=precision_of(qkv_tF.dtype), BLOCK_M=tiles.m, BLOCK_N=tiles.n, own=local.own_t,
            kv_stride=kv_TF.stride(0), keys=kv_TF.shape[0], CONTEXT=True,
            num_warps=tiles.warps, num_stages=tiles.stages, **options,
        )  # fmt: skip


class _ContextAttention(torch.autograd.Function):
    """Keys and values of other ranks are held during a pass only: backward gathers them a second time."""

    @staticmethod
    def forward(
        ctx: Any, qkv_tF: Tensor, shape: HeadShape, local: LocalChunks, exchange: Exchange, scale: float
    ) -> Tensor:
        kv_TF = exchange.gather(_keys_of(qkv_tF, shape))()
        out_thK, lse_ht = launch_forward(qkv_tF, kv_TF, shape, local, scale)
        ctx.save_for_backward(qkv_tF, out_thK, lse_ht)
        ctx.shape, ctx.local, ctx.exchange, ctx.scale = shape, local, exchange, scale
        return out_thK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        qkv_tF, out_thK, lse_ht = ctx.saved_tensors
        shape, local, scale, d_out_thK = ctx.shape, ctx.local, ctx.scale, grads[0].contiguous()
        gathered = ctx.exchange.gather(_keys_of(qkv_tF, shape))
        d_qkv_tF, delta_ht = torch.empty_like(qkv_tF), launch_delta(out_thK, d_out_thK, lse_ht)
        kv_TF, d_out_tF = gathered(), d_out_thK.flatten(1)
        summed = ctx.exchange.scatter(launch_keys(d_out_tF, qkv_tF, kv_TF, lse_ht, delta_ht, shape, local, scale))
        launch_queries_(d_qkv_tF, d_out_tF, qkv_tF, kv_TF, lse_ht, delta_ht, shape, local, scale)  # as the sums travel
        d_kv_tgnK = _split(d_qkv_tF, shape)[1]
        d_kv_tgnK.copy_(summed().view_as(d_kv_tgnK))
        return d_qkv_tF, None, None, None, None


@torch.compiler.disable  # a compiled block calls it between two graphs: transfers under way are no part of one
def context_attention(
    qkv_tF: Tensor, shape: HeadShape, local: LocalChunks, exchange: Exchange,
    cos_SR: Tensor | None = None, sin_SR: Tensor | None = None, *, interleaved: bool = False,
    scale: float | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """rotary_attention for the tokens of a rank that holds a part of each sequence; [local tokens, heads, head_dim].

    qkv_tF is the packed QKV projection of the local tokens, `exchange` brings the keys and values of the others.
    While a pass is at it a rank holds those of all tokens, 2 x groups x head_dim x batch x length values, and in
    backward as many gradients; between forward and backward only what is local (with sdpa and flash_attn, which leave
    that to autograd, all of them). Gradients of keys and values are summed over ranks in the activations' type, as
    tensor parallelism sums its own; their sum travels while the queries' are computed.
    `scale` and `backend` as in rotary_attention. Raises ValueError for packed documents with flash_attn.
    """
    qkv_tF = rotated(qkv_tF, shape, Sequences(), cos_SR, sin_SR, local.position_t, interleaved).contiguous()
    if resolve_backend(backend, qkv_tF) == "triton":
        result: Tensor = _ContextAttention.apply(
            qkv_tF, shape, local, exchange, shape.head_dim**-0.5 if scale is None else scale
        )
        return result
    if backend == "flash_attn" and local.is_packed:
        raise ValueError("attention_backend flash_attn cannot share packed documents among ranks: use triton or sdpa")
    kv_TF = _Gather.apply(_keys_of(qkv_tF, shape), exchange)
    return _by_chunks(qkv_tF, kv_TF, shape, local, scale, is_flash=backend == "flash_attn")
