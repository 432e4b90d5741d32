"""Dropout (Srivastava et al. 2014) whose mask is a function of seed, place in the model, token and channel.

Random numbers are Philox 4x32-10 (Salmon et al. 2011) of these as its key and counter, not a state that moves on: any
layout drops the same entries, a resumed run goes on with those it would have had, and backward makes them again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapoly_kernels.launch import resolve_backend

_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)  # of the multiplications, and what the key grows by: the paper's constants
_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROWS, _COLUMNS = 4, 256


@triton.jit
def _drop(x_tH, y_tH, word, x_offset, y_offset, mask, threshold, scale):
    x = tl.load(x_tH + x_offset, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(word.to(tl.int64) >= threshold, x * scale, 0.0)
    tl.store(y_tH + y_offset, y.to(y_tH.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "place", "threshold"])
def _dropout_kernel(
    x_tH, token_t, y_tH, T, H, quarter, x_stride, column_tiles, seed, place, threshold, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # The four words of a counter are for four channels a quarter of the row apart: each is read and written in a row.
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.load(token_t + row, mask=row < T, other=0)
    low, high = (token & 0xFFFFFFFF).to(tl.uint32), (token >> 32).to(tl.uint32)
    zero = tl.zeros([ROWS, COLUMNS], tl.uint32)
    first = zero + column.to(tl.uint32)[None, :]
    word_0, word_1, word_2, word_3 = tl.philox(seed, first, zero + low[:, None], zero + high[:, None], zero + place)
    x_offset, y_offset = row[:, None] * x_stride + column[None, :], row[:, None] * H + column[None, :]
    is_row, is_column = row[:, None] < T, column[None, :] < quarter
    for number in tl.static_range(4):
        begin = number * quarter
        word = word_0 if number == 0 else word_1 if number == 1 else word_2 if number == 2 else word_3
        mask = is_row & is_column & (begin + column[None, :] < H)
        _drop(x_tH, y_tH, word, begin + x_offset, begin + y_offset, mask, threshold, scale)


def _threshold(rate: float) -> int:
    """The least word of an entry that is kept."""
    return round(rate * 2**32)


@torch.library.custom_op("megapoly::dropout", mutates_args=())
def _dropout(x_tH: Tensor, token_t: Tensor, rate: float, seed: int, place: int) -> Tensor:
    tokens, hidden = x_tH.shape
    x_tH = x_tH if x_tH.stride(1) == 1 else x_tH.contiguous()
    y_tH = torch.empty((tokens, hidden), dtype=x_tH.dtype, device=x_tH.device)
    quarter = triton.cdiv(hidden, 4)
    column_tiles = triton.cdiv(quarter, _COLUMNS)
    if tokens:
        with torch.cuda.device_of(x_tH):
            _dropout_kernel[(triton.cdiv(tokens, _ROWS) * column_tiles,)](
                x_tH, token_t, y_tH, tokens, hidden, quarter, x_tH.stride(0), column_tiles, seed, place,
                _threshold(rate), 1 / (1 - rate), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
            )  # fmt: skip
    return y_tH


@_dropout.register_fake
def _(x_tH: Tensor, token_t: Tensor, rate: float, seed: int, place: int) -> Tensor:
    return x_tH.new_empty(x_tH.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tH: Tensor, token_t: Tensor, rate: float, seed: int, place: int) -> Tensor:
        ctx.save_for_backward(token_t)
        ctx.drawn = rate, seed, place
        return _dropout(x_tH, token_t, rate, seed, place)

    @staticmethod
    def backward(ctx: Any, dy_tH: Tensor) -> tuple[Tensor | None, ...]:
        return _dropout(dy_tH, *ctx.saved_tensors, *ctx.drawn), None, None, None, None


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 in plain torch: four words from a counter of four and a key of two, as int64 below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        a, b = c0 * _FACTORS[0], c2 * _FACTORS[1]  # 64 bits, modulo 2^64
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + _STEPS[0] & _WORD, k1 + _STEPS[1] & _WORD
    return c0, c1, c2, c3


def dropout_reference(x_tH: Tensor, token_t: Tensor, rate: float, seed: int, place: int) -> Tensor:
    """The operation in plain torch."""
    tokens, hidden = x_tH.shape
    quarter = -(-hidden // 4)
    first = torch.arange(quarter, device=x_tH.device).expand(tokens, quarter)
    low, high = (token_t & _WORD)[:, None], (token_t >> 32)[:, None]
    words = philox((first, low, high, torch.full_like(low, place)), (seed & _WORD, seed >> 32 & _WORD))
    is_kept_tH = torch.cat(words, 1)[:, :hidden] >= _threshold(rate)
    scaled_tH = x_tH.float() * (1 / (1 - rate))
    return torch.where(is_kept_tH, scaled_tH, 0.0).to(x_tH.dtype)


def dropout(
    x_tH: Tensor, token_t: Tensor, rate: float, seed: int, place: int, backend: str | None = None
) -> Tensor:  # fmt: skip
    """x / (1 - rate), with each entry zero by chance, `rate` of them.

    x_tH is [tokens, hidden], token_t int64 [tokens] what tells tokens apart, 0 <= rate < 1; `place` (below 2^31) is
    which of the model's dropouts this is. In fp32. `backend`: triton or torch (default: triton on a GPU).
    """
    if resolve_backend(backend, x_tH) == "torch":
        return dropout_reference(x_tH, token_t, rate, seed, place)
    return _Dropout.apply(x_tH, token_t, rate, seed, place)
