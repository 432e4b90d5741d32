"""Backward of causal flash attention: keys and values in one kernel, queries in another; no atomics, so deterministic.

Queries and keys are read as the forward left them, rotated; the gradients are rotated back as they are stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapoly_kernels.attention_forward import (
    LOG2_E,
    Tiles,
    can_use_tma,
    has_big_tiles,
    head_options,
    precision_of,
    source_of,
)
from megapoly_kernels.attention_tiles import (
    key_range,
    load_row,
    load_tile,
    query_range,
    rotate_back,
    sequence_start,
    token_position,
)
from megapoly_kernels.launch import target_of


@triton.jit
def attention_delta_kernel(
    out, d_out, delta, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr
):
    """Row sums of out x its gradient: [tokens x heads, D] -> fp32 [heads, tokens]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    is_used = (row < rows)[:, None] & (channel < D)[None, :]
    at = row[:, None] * D + channel[None, :]
    product = tl.load(out + at, mask=is_used, other=0.0).to(tl.float32)
    product *= tl.load(d_out + at, mask=is_used, other=0.0).to(tl.float32)
    tl.store(delta + row % HEADS * (rows // HEADS) + row // HEADS, tl.sum(product, 1), mask=row < rows)


@triton.jit
def _visit_queries(
    d_k, d_v, k, v, source, d_source, lse, delta, head, slope, q_column, out_column, stride, out_stride,
    rows, begin, end, lowest, highest, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, ALIBI: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the query tiles from begin to end give to the gradients of one tile of keys and values.

    The rows from `lowest` (where rows are tokens, the key's own) to before `highest` see a key.
    """
    for m in tl.range(begin, end, BLOCK_M):
        m = tl.multiple_of(m, BLOCK_M)
        row = m + tl.arange(0, BLOCK_M)
        q = load_tile(source, m, q_column, stride, rows, BLOCK_M, D, BLOCK_D, MASKED, TMA)
        row_lse = load_row(lse, head, m, rows, BLOCK_M, TMA)
        row_delta = load_row(delta, head, m, rows, BLOCK_M, TMA)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if ALIBI:
            scores -= slope * (row[None, :] - lowest[:, None]).to(tl.float32)
        weight = tl.math.exp2(scores - row_lse[None, :])
        if MASKED:
            weight = tl.where((lowest[:, None] <= row[None, :]) & (row[None, :] < highest[:, None]), weight, 0.0)
        d_o = load_tile(d_source, m, out_column, out_stride, rows, BLOCK_M, D, BLOCK_D, MASKED, TMA)
        d_v = tl.dot(weight.to(d_o.dtype), d_o, d_v, input_precision=PRECISION)
        d_weight = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
        d_scores = (weight * (d_weight - row_delta[None, :])).to(q.dtype)
        d_k = tl.dot(d_scores, q, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit
def attention_backward_keys_kernel(
    qkv, source, d_source, d_qkv, lse, delta, cos, sin, position, start, end, slopes,
    stride, out_stride, tokens, length, window, scale,
    QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, PACKED: tl.constexpr, HAS_POSITION: tl.constexpr, TAIL: tl.constexpr, WINDOWED: tl.constexpr,
    ALIBI: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    q_stride=None, rows=None, CONTEXT: tl.constexpr = False,
):  # fmt: skip
    """Gradients of one tile of keys and values of one group, from all query heads that read them.

    With CONTEXT qkv and d_qkv are buffers of keys and values alone, [tokens, groups, 2, D]; the `rows` queries lie in
    `source`, and those from start[i] to before end[i] see key i.
    """
    n = tl.program_id(0) * BLOCK_N
    group = tl.program_id(1)
    key = n + tl.arange(0, BLOCK_N)
    is_key = key < tokens
    if CONTEXT:
        k_column = group * 2 * D
    else:
        k_column = (group * (QUERIES + 2) + QUERIES) * D
        q_stride, rows = stride, tokens
    k = load_tile(qkv, n, k_column, stride, tokens, BLOCK_N, D, BLOCK_D, True, False)
    v = load_tile(qkv, n, k_column + D, stride, tokens, BLOCK_N, D, BLOCK_D, True, False)

    lowest, highest, begin, past_diagonal, full, after = query_range(
        start, end, n, key, tokens, length, window, PACKED, WINDOWED, TAIL, BLOCK_M, BLOCK_N, CONTEXT
    )
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for query in range(QUERIES):
        head = group * QUERIES + query
        q_column = (group * (QUERIES + 2) + query) * D
        slope = tl.load(slopes + head) * LOG2_E if ALIBI else 0.0
        d_k, d_v = _visit_queries(
            d_k, d_v, k, v, source, d_source, lse, delta, head, slope, q_column, head * D, q_stride, out_stride,
            rows, begin, past_diagonal, lowest, highest, scale, D, BLOCK_D, BLOCK_M, True, ALIBI, TMA, PRECISION,
        )  # fmt: skip
        d_k, d_v = _visit_queries(
            d_k, d_v, k, v, source, d_source, lse, delta, head, slope, q_column, head * D, q_stride, out_stride,
            rows, past_diagonal, full, lowest, highest, scale, D, BLOCK_D, BLOCK_M, False, ALIBI, TMA, PRECISION,
        )  # fmt: skip
        if TAIL:
            d_k, d_v = _visit_queries(
                d_k, d_v, k, v, source, d_source, lse, delta, head, slope, q_column, head * D, q_stride, out_stride,
                rows, full, after, lowest, highest, scale, D, BLOCK_D, BLOCK_M, True, ALIBI, TMA, PRECISION,
            )  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    is_used = is_key[:, None] & (channel < D)[None, :]
    at = d_qkv + key.to(tl.int64)[:, None] * stride + k_column + channel[None, :]
    tl.store(at + D, d_v.to(d_qkv.dtype.element_ty), mask=is_used)  # before the rotation, which needs its registers
    d_k *= scale / LOG2_E
    if HALF > 0:
        first = sequence_start(start, key, tokens, length, PACKED)
        place = token_position(position, key, first, is_key, HAS_POSITION)
        d_k = rotate_back(d_k, is_key, place, cos, sin, BLOCK_N, BLOCK_D, HALF, INTERLEAVED, WIDE)
    tl.store(at, d_k.to(d_qkv.dtype.element_ty), mask=is_used)


@triton.jit
def _visit_keys_again(
    d_q, q, d_o, row_lse, row_delta, source, slope, k_column, stride, keys, begin, end, last, lowest, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, ALIBI: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the key tiles from begin to end give to the gradient of one tile of queries."""
    for n in tl.range(begin, end, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        key = n + tl.arange(0, BLOCK_N)
        k = load_tile(source, n, k_column, stride, keys, BLOCK_N, D, BLOCK_D, MASKED, TMA)
        v = load_tile(source, n, k_column + D, stride, keys, BLOCK_N, D, BLOCK_D, MASKED, TMA)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if ALIBI:
            scores -= slope * (last[:, None] - key[None, :]).to(tl.float32)
        weight = tl.math.exp2(scores - row_lse[:, None])
        if MASKED:
            weight = tl.where((key[None, :] <= last[:, None]) & (key[None, :] >= lowest[:, None]), weight, 0.0)
        d_weight = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
        d_scores = (weight * (d_weight - row_delta[:, None])).to(k.dtype)
        d_q = tl.dot(d_scores, k, d_q, input_precision=PRECISION)
    return d_q


@triton.jit
def attention_backward_queries_kernel(
    qkv, source, d_out, d_qkv, lse, delta, cos, sin, position, start, slopes,
    stride, out_stride, tokens, length, window, scale,
    QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, PACKED: tl.constexpr, HAS_POSITION: tl.constexpr, LEAD: tl.constexpr, WINDOWED: tl.constexpr,
    ALIBI: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    own=None, kv_stride=None, keys=None, CONTEXT: tl.constexpr = False,
):  # fmt: skip
    """Gradient of one tile of queries of one head; CONTEXT as in attention_forward_kernel."""
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    group = head // QUERIES
    row = m + tl.arange(0, BLOCK_M)
    is_row = row < tokens
    q_column = (group * (QUERIES + 2) + head % QUERIES) * D
    if CONTEXT:
        k_column = group * 2 * D
        last = tl.load(own + row, mask=is_row, other=0)
    else:
        k_column = (group * (QUERIES + 2) + QUERIES) * D
        kv_stride, keys, last = stride, tokens, row
    q = load_tile(qkv, m, q_column, stride, tokens, BLOCK_M, D, BLOCK_D, True, False)
    d_o = load_tile(d_out, m, head * D, out_stride, tokens, BLOCK_M, D, BLOCK_D, True, False)
    row_lse = tl.load(lse + head.to(tl.int64) * tokens + row, mask=is_row, other=0.0)
    row_delta = tl.load(delta + head.to(tl.int64) * tokens + row, mask=is_row, other=0.0)

    first = sequence_start(start, row, tokens, length, PACKED)
    lowest, last_key, begin, full, diagonal = key_range(
        start, m, row, first, tokens, length, window, PACKED, WINDOWED, LEAD, BLOCK_M, BLOCK_N, own, CONTEXT
    )
    slope = tl.load(slopes + head) * LOG2_E if ALIBI else 0.0
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEAD:
        d_q = _visit_keys_again(
            d_q, q, d_o, row_lse, row_delta, source, slope, k_column, kv_stride, keys, begin, full, last, lowest,
            scale, D, BLOCK_D, BLOCK_N, True, ALIBI, TMA, PRECISION,
        )  # fmt: skip
    d_q = _visit_keys_again(
        d_q, q, d_o, row_lse, row_delta, source, slope, k_column, kv_stride, keys, full, diagonal, last, lowest,
        scale, D, BLOCK_D, BLOCK_N, False, ALIBI, TMA, PRECISION,
    )  # fmt: skip
    d_q = _visit_keys_again(
        d_q, q, d_o, row_lse, row_delta, source, slope, k_column, kv_stride, keys, diagonal, last_key + 1, last,
        lowest, scale, D, BLOCK_D, BLOCK_N, True, ALIBI, TMA, PRECISION,
    )  # fmt: skip
    d_q *= scale / LOG2_E
    if HALF > 0:
        place = token_position(position, row, first, is_row, HAS_POSITION)
        d_q = rotate_back(d_q, is_row, place, cos, sin, BLOCK_M, BLOCK_D, HALF, INTERLEAVED, WIDE)
    channel = tl.arange(0, BLOCK_D)
    at = d_qkv + row.to(tl.int64)[:, None] * stride + q_column + channel[None, :]
    tl.store(at, d_q.to(d_qkv.dtype.element_ty), mask=is_row[:, None] & (channel < D)[None, :])


def backward_tiles(arch: int, dtype: torch.dtype, block_d: int) -> tuple[Tiles, Tiles]:
    """Tiles of the kernel for keys and values, and of the one for queries."""
    if dtype == torch.float32:
        return Tiles(16, 32, 4, 2), Tiles(32, 16, 4, 2)
    width = min(max(block_d, 64), 256)
    if has_big_tiles(arch):
        return {
            64: (Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
            128: (Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 2)),
            256: (Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 2)),
        }[width]
    other = 32 if arch == 80 else 16  # GPUs beside the A100 have 99 KB of shared memory a block
    return {
        64: (Tiles(32, 128, 8, 3), Tiles(128, 64, 8, 3)),
        128: (Tiles(32, 128, 8, 2), Tiles(128, 32, 8, 2)),
        256: (Tiles(other, 64, 8, 2), Tiles(64, other, 8, 2)),
    }[width]


def launch_backward(
    d_out_ThK: Tensor, qkv_TF: Tensor, out_ThK: Tensor, lse_hT: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None,
    position_T: Tensor | None, start_T: Tensor | None, end_T: Tensor | None, slopes_h: Tensor | None,
    groups: int, queries: int, head_dim: int, length: int, window: int, interleaved: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Gradient of the packed, unrotated QKV buffer; qkv_TF holds rotated queries and keys as the forward left them."""
    tokens, heads = qkv_TF.shape[0], groups * queries
    d_qkv_TF = torch.empty_like(qkv_TF)
    if not tokens:
        return d_qkv_TF
    d_out_ThK = d_out_ThK.contiguous()
    delta_hT = torch.empty_like(lse_hT)
    arch = target_of(qkv_TF).arch
    options: dict[str, Any] = head_options(head_dim, queries, cos_SR, interleaved, start_T, position_T)
    for_keys, for_queries = backward_tiles(arch, qkv_TF.dtype, options["BLOCK_D"])
    tma = can_use_tma(qkv_TF, head_dim) and can_use_tma(d_out_ThK.flatten(1), head_dim) and tokens % 4 == 0
    options |= dict(
        WINDOWED=window > 0, ALIBI=slopes_h is not None, TMA=tma, PRECISION=precision_of(qkv_TF.dtype)
    )  # fmt: skip
    d_out_TF, scale = d_out_ThK.flatten(1), scale * LOG2_E.value

    def is_ragged(tiles: Tiles) -> bool:
        return start_T is not None or length % tiles.m != 0 or length % tiles.n != 0 or window > 0

    with torch.cuda.device_of(qkv_TF):
        rows = 4096 // options["BLOCK_D"]
        attention_delta_kernel[(triton.cdiv(tokens * heads, rows),)](
            out_ThK, d_out_ThK, delta_hT, tokens * heads,
            D=head_dim, BLOCK_D=options["BLOCK_D"], HEADS=heads, ROWS=rows, num_warps=4,
        )  # fmt: skip
        attention_backward_keys_kernel[(triton.cdiv(tokens, for_keys.n), groups)](
            qkv_TF, source_of(qkv_TF, for_keys.m, head_dim, tma), source_of(d_out_TF, for_keys.m, head_dim, tma),
            d_qkv_TF, source_of(lse_hT, 1, for_keys.m, tma), source_of(delta_hT, 1, for_keys.m, tma),
            cos_SR, sin_SR, position_T, start_T, end_T, slopes_h,
            qkv_TF.stride(0), heads * head_dim, tokens, length, window, scale, TAIL=is_ragged(for_keys),
            BLOCK_M=for_keys.m, BLOCK_N=for_keys.n, num_warps=for_keys.warps, num_stages=for_keys.stages, **options,
        )  # fmt: skip
        attention_backward_queries_kernel[(triton.cdiv(tokens, for_queries.m), heads)](
            qkv_TF, source_of(qkv_TF, for_queries.n, head_dim, tma), d_out_TF,
            d_qkv_TF, lse_hT, delta_hT, cos_SR, sin_SR, position_T, start_T, slopes_h,
            qkv_TF.stride(0), heads * head_dim, tokens, length, window, scale, LEAD=is_ragged(for_queries),
            BLOCK_M=for_queries.m, BLOCK_N=for_queries.n, num_warps=for_queries.warps,
            num_stages=for_queries.stages, **options,
        )  # fmt: skip
    return d_qkv_TF
