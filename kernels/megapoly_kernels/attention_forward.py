"""Forward of causal flash attention: keys are rotated once, queries in the prologue of their tile."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megapoly_kernels.attention_tiles import key_range, load_tile, rotate_in_place, sequence_start, token_position
from megapoly_kernels.launch import target_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rotate_keys_kernel(
    qkv, cos, sin, position, start, stride, tokens, length,
    QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, PACKED: tl.constexpr, HAS_POSITION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate the keys of ROWS tokens and one group where they lie."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = token < tokens
    first = sequence_start(start, token, tokens, length, PACKED)
    place = token_position(position, token, first, is_row, HAS_POSITION)
    column = (tl.program_id(1) * (QUERIES + 2) + QUERIES) * D
    offset = token.to(tl.int64) * stride
    rotate_in_place(
        qkv + column, offset, is_row, place, cos, sin, ROWS, D, BLOCK_D, HALF, INTERLEAVED, WIDE,
    )  # fmt: skip


@triton.jit
def _visit_keys(
    accumulated, total, top, q, source, slope, k_column, v_column, stride, keys, begin, end, last, lowest, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, ALIBI: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles from begin to end; scores are in units of log 2. A row sees lowest to last."""
    for n in tl.range(begin, end, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        k = load_tile(source, n, k_column, stride, keys, BLOCK_N, D, BLOCK_D, MASKED, TMA)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED or ALIBI:
            key = n + tl.arange(0, BLOCK_N)
            scores *= scale
            if ALIBI:
                scores -= slope * (last[:, None] - key[None, :]).to(tl.float32)
            if MASKED:
                # Finite: a row that sees nothing in this tile stays free of NaN, and its first real key wipes the sums.
                is_seen = (key[None, :] <= last[:, None]) & (key[None, :] >= lowest[:, None])
                scores = tl.where(is_seen, scores, -1.0e30)
            new_top = tl.maximum(top, tl.max(scores, 1))
            scores -= new_top[:, None]
        else:  # scaled after the maximum: one fused multiply-add an entry
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            scores = scores * scale - new_top[:, None]
        weight = tl.math.exp2(scores)
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        accumulated = accumulated * shrink[:, None]
        v = load_tile(source, n, v_column, stride, keys, BLOCK_N, D, BLOCK_D, MASKED, TMA)
        accumulated = tl.dot(weight.to(v.dtype), v, accumulated, input_precision=PRECISION)
        top = new_top
    return accumulated, total, top


@triton.jit
def attention_forward_kernel(
    qkv, source, out, lse, cos, sin, position, start, slopes, stride, tokens, length, window, scale,
    QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, PACKED: tl.constexpr, HAS_POSITION: tl.constexpr, LEAD: tl.constexpr, WINDOWED: tl.constexpr,
    ALIBI: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    own=None, kv_stride=None, keys=None, CONTEXT: tl.constexpr = False,
):  # fmt: skip
    """One tile of queries of one head: rotate it, attend, store the output and the log-sum-exp.

    With CONTEXT keys and values lie in a buffer of their own, `source`, [keys, groups, 2, D]: see key_range.
    """
    # The last tiles of a sequence see the most keys: they go first.
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    group, heads = head // QUERIES, tl.num_programs(1)
    row = m + tl.arange(0, BLOCK_M)
    is_row = row < tokens
    first = sequence_start(start, row, tokens, length, PACKED)
    head_offset = (group * (QUERIES + 2) + head % QUERIES) * D
    if CONTEXT:
        k_column = group * 2 * D
        last = tl.load(own + row, mask=is_row, other=0)
    else:
        k_column = (group * (QUERIES + 2) + QUERIES) * D
        kv_stride, keys, last = stride, tokens, row
    if HALF > 0:
        place = token_position(position, row, first, is_row, HAS_POSITION)
        offset = row.to(tl.int64) * stride
        q = rotate_in_place(
            qkv + head_offset, offset, is_row, place, cos, sin, BLOCK_M, D, BLOCK_D, HALF, INTERLEAVED, WIDE,
        )  # fmt: skip
    else:
        q = load_tile(qkv, m, head_offset, stride, tokens, BLOCK_M, D, BLOCK_D, True, False)

    lowest, last_key, begin, full, diagonal = key_range(
        start, m, row, first, tokens, length, window, PACKED, WINDOWED, LEAD, BLOCK_M, BLOCK_N, own, CONTEXT
    )
    slope = tl.load(slopes + head) * LOG2_E if ALIBI else 0.0

    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if LEAD:
        accumulated, total, top = _visit_keys(
            accumulated, total, top, q, source, slope, k_column, k_column + D, kv_stride, keys, begin, full, last,
            lowest, scale, D, BLOCK_D, BLOCK_N, True, ALIBI, TMA, PRECISION,
        )  # fmt: skip
    accumulated, total, top = _visit_keys(
        accumulated, total, top, q, source, slope, k_column, k_column + D, kv_stride, keys, full, diagonal, last,
        lowest, scale, D, BLOCK_D, BLOCK_N, False, ALIBI, TMA, PRECISION,
    )  # fmt: skip
    accumulated, total, top = _visit_keys(
        accumulated, total, top, q, source, slope, k_column, k_column + D, kv_stride, keys, diagonal, last_key + 1,
        last, lowest, scale, D, BLOCK_D, BLOCK_N, True, ALIBI, TMA, PRECISION,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    at = out + row.to(tl.int64)[:, None] * (heads * D) + head * D + channel[None, :]
    accumulated = (accumulated / total[:, None]).to(out.dtype.element_ty)
    tl.store(at, accumulated, mask=is_row[:, None] & (channel < D)[None, :])
    tl.store(lse + head.to(tl.int64) * tokens + row, top + tl.math.log2(total), mask=is_row)


@dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel's tiles, its warps and the depth of its software pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def forward_tiles(arch: int, dtype: torch.dtype, block_d: int) -> Tiles:
    """Queries x keys a tile, by width of the head: what spills nothing in the loop and fills the tensor cores.

    On Hopper some shapes make the assembler wait after every product; those are out (see `serial` in the report).
    """
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2)
    if has_big_tiles(arch):
        return {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 64, 8, 3)}.get(max(block_d, 64), Tiles(128, 32, 8, 2))
    return {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3)}.get(max(block_d, 64), Tiles(64, 32, 8, 2))


def has_big_tiles(arch: int) -> bool:
    """Hopper and the data-centre Blackwells: 227 KB of shared memory a block, and the tensor memory accelerator."""
    return arch in (90, 100, 103)


def head_options(
    head_dim: int, queries: int, cos_SR: Tensor | None, interleaved: bool, start_T: Tensor | None,
    position_T: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time description of heads, rotation and sequences that all kernels take."""
    half, block_d = 0 if cos_SR is None else cos_SR.shape[1], max(16, triton.next_power_of_2(head_dim))
    is_wide = not interleaved and half >= 8 and head_dim == block_d and half == triton.next_power_of_2(half)
    return dict(
        QUERIES=queries, D=head_dim, BLOCK_D=block_d, HALF=half, INTERLEAVED=interleaved, WIDE=is_wide,
        PACKED=start_T is not None, HAS_POSITION=position_T is not None,
    )  # fmt: skip


def precision_of(dtype: torch.dtype) -> str:
    """fp32 stays fp32: tf32 would lose 13 bits without being asked."""
    return "ieee" if dtype == torch.float32 else "tf32"


def can_use_tma(x_TF: Tensor, head_dim: int) -> bool:
    """Whether heads of x can be fetched by the tensor memory accelerator: 16 bits, a power of two, aligned."""
    return (
        has_big_tiles(target_of(x_TF).arch)
        and x_TF.element_size() == 2
        and head_dim == triton.next_power_of_2(head_dim)
        and x_TF.stride(0) * x_TF.element_size() % 16 == 0
        and x_TF.data_ptr() % 16 == 0
    )


def source_of(x_TF: Tensor, rows: int, head_dim: int, tma: bool) -> Tensor | TensorDescriptor:
    """What load_tile reads tiles of `rows` x head_dim from."""
    return TensorDescriptor.from_tensor(x_TF, [rows, head_dim]) if tma else x_TF


def empty_outputs(qkv_TF: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Room for the output, [tokens, heads, head_dim], and the log-sum-exp, fp32 [heads, tokens]."""
    tokens = qkv_TF.shape[0]
    return qkv_TF.new_empty((tokens, heads, head_dim)), qkv_TF.new_empty((heads, tokens), dtype=torch.float32)


def launch_forward(
    qkv_TF: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None, position_T: Tensor | None, start_T: Tensor | None,
    slopes_h: Tensor | None, groups: int, queries: int, head_dim: int, length: int, window: int, interleaved: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate queries and keys in qkv_TF (where there is a table) and attend; (out [tokens, heads, head_dim], log2-sum).

    window 0 means none. The log-sum-exp of the scaled scores, base 2, is fp32 [heads, tokens].
    """
    tokens, heads = qkv_TF.shape[0], groups * queries
    out_ThK, lse_hT = empty_outputs(qkv_TF, heads, head_dim)
    if not tokens:
        return out_ThK, lse_hT
    block_d = max(16, triton.next_power_of_2(head_dim))
    tiles = forward_tiles(target_of(qkv_TF).arch, qkv_TF.dtype, block_d)
    tma = can_use_tma(qkv_TF, head_dim)
    shared = head_options(head_dim, queries, cos_SR, interleaved, start_T, position_T)
    is_aligned = start_T is None and length % tiles.m == 0 and length % tiles.n == 0
    with torch.cuda.device_of(qkv_TF):
        if cos_SR is not None:
            rows = 2048 // block_d
            rotate_keys_kernel[(triton.cdiv(tokens, rows), groups)](
                qkv_TF, cos_SR, sin_SR, position_T, start_T, qkv_TF.stride(0), tokens, length,
                ROWS=rows, num_warps=4, **shared,
            )  # fmt: skip
        attention_forward_kernel[(triton.cdiv(tokens, tiles.m), heads)](
            qkv_TF, source_of(qkv_TF, tiles.n, head_dim, tma), out_ThK, lse_hT, cos_SR, sin_SR, position_T, start_T,
            slopes_h, qkv_TF.stride(0), tokens, length, window, scale * LOG2_E.value,
            LEAD=not is_aligned or window > 0, WINDOWED=window > 0, ALIBI=slopes_h is not None, TMA=tma,
            PRECISION=precision_of(qkv_TF.dtype), BLOCK_M=tiles.m, BLOCK_N=tiles.n,
            num_warps=tiles.warps, num_stages=tiles.stages, **shared,
        )  # fmt: skip
    return out_ThK, lse_hT
