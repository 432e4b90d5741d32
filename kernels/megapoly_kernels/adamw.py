"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over ranges of a flat fp32 shard, and sums of squares there.

A range table cuts the ranges once into blocks whose first entries are multiples of the block's length, so that all
but the blocks at a range's borders are read and written without masks, 128 bits at a time. One launch then updates
the whole shard: unscaling, clipping, moments, decoupled decay, master weights and their low-precision copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw

from megapoly_kernels.launch import resolve_backend, target_of

BLOCK = 4096
# What a program of 8 warps updates at a time. At 4 entries a thread one layout is right for fp32 (128 bits) and for the
# low-precision copy (64 bits); at more, Triton takes two, and carries every array through shared memory between them.
PART = 1024
DOT_BLOCK = 1 << 16  # on a CPU


class Range(NamedTuple):
    """Entries begin to end of a flat shard, how strongly they decay, and what multiplies their learning rate."""

    begin: int
    end: int
    weight_decay: float = 0.0
    lr_scale: float = 1.0


def merged(ranges: Sequence[Range]) -> list[Range]:
    """The same entries with neighbours of one rule joined and empty ranges dropped; `ranges` come in order."""
    result: list[Range] = []
    for r in ranges:
        if r.begin >= r.end:
            continue
        if result and result[-1].end == r.begin and result[-1][2:] == r[2:]:
            result[-1] = result[-1]._replace(end=r.end)
        else:
            result.append(r)
    return result


@dataclass(frozen=True)
class RangeTable:
    """Ranges of a flat shard, cut into blocks on the device, one entry a block in each tensor.

    Block number `block_N` (int32, in units of BLOCK entries of the shard) is taken from its entry low_N to the one
    before high_N (int32); decay_N is its weight decay and rate_N the factor of its learning rate, fp32.
    """

    ranges: tuple[Range, ...]
    block_N: Tensor
    low_N: Tensor
    high_N: Tensor
    decay_N: Tensor
    rate_N: Tensor

    @classmethod
    def build(cls, ranges: Sequence[Range], device: torch.device) -> Self:
        """Cut ranges, which come in order and do not overlap; empty ones may be among them."""
        ends = [0, *(r.end for r in ranges)]
        assert all(end <= r.begin <= r.end for end, r in zip(ends, ranges, strict=False)), ranges
        blocks, lows, highs, decays, rates = [], [], [], [], []
        for begin, end, weight_decay, lr_scale in ranges:
            if begin == end:
                continue
            block_N = torch.arange(begin // BLOCK, (end - 1) // BLOCK + 1)
            blocks.append(block_N)
            lows.append((begin - block_N * BLOCK).clamp(min=0))
            highs.append((end - block_N * BLOCK).clamp(max=BLOCK))
            decays.append(torch.full(block_N.shape, weight_decay))
            rates.append(torch.full(block_N.shape, lr_scale))

        def together(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            return torch.cat(parts).to(device, dtype) if parts else torch.empty(0, dtype=dtype, device=device)

        block_N, low_N, high_N = (together(parts, torch.int32) for parts in (blocks, lows, highs))
        decay_N, rate_N = (together(parts, torch.float32) for parts in (decays, rates))
        return cls(tuple(ranges), block_N, low_N, high_N, decay_N, rate_N)

    @property
    def end(self) -> int:
        """The entry after the last one."""
        return self.ranges[-1].end if self.ranges else 0


@triton.jit
def _update(
    at, mask, master_E, grad_E, exp_avg_E, exp_avg_sq_E, params_E,
    scale, keep, lerp1, beta2, lerp2, step_size, root_bias2, eps,
):  # fmt: skip
    g = tl.load(grad_E + at, mask=mask).to(tl.float32) * scale
    m = tl.load(exp_avg_E + at, mask=mask)
    v = tl.load(exp_avg_sq_E + at, mask=mask)
    p = tl.load(master_E + at, mask=mask) * keep
    m += lerp1 * (g - m)
    v = beta2 * v + lerp2 * g * g
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_bias2) + eps)
    tl.store(exp_avg_E + at, m, mask=mask)
    tl.store(exp_avg_sq_E + at, v, mask=mask)
    tl.store(master_E + at, p, mask=mask)
    if params_E is not None:
        tl.store(params_E + at, p.to(params_E.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    master_E, grad_E, exp_avg_E, exp_avg_sq_E, params_E, scale_ptr, block_N, low_N, high_N, decay_N, rate_N,
    lr, lerp1, beta2, lerp2, step_size, root_bias2, eps, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    low = tl.load(low_N + number)
    high = tl.load(high_N + number)
    rate = tl.load(rate_N + number)
    keep = 1.0 - lr * rate * tl.load(decay_N + number)
    step_size *= rate
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    first = tl.load(block_N + number).to(tl.int64) * BLOCK
    if scale == scale:
        if high - low == BLOCK:
            for part in range(0, BLOCK, PART):
                _update(
                    first + part + tl.arange(0, PART), None, master_E, grad_E, exp_avg_E, exp_avg_sq_E, params_E,
                    scale, keep, lerp1, beta2, lerp2, step_size, root_bias2, eps,
                )  # fmt: skip
        else:
            for part in range(0, BLOCK, PART):
                lane = part + tl.arange(0, PART)
                _update(
                    first + lane, (lane >= low) & (lane < high), master_E, grad_E, exp_avg_E, exp_avg_sq_E, params_E,
                    scale, keep, lerp1, beta2, lerp2, step_size, root_bias2, eps,
                )  # fmt: skip


@triton.jit
def _squares_kernel(x_E, block_N, low_N, high_N, partial_P, N, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(tl.program_id(0), N, tl.num_programs(0)):
        low = tl.load(low_N + number)
        high = tl.load(high_N + number)
        at = tl.load(block_N + number).to(tl.int64) * BLOCK + lane
        if high - low == BLOCK:
            x = tl.load(x_E + at)
            total += x * x
        else:
            x = tl.load(x_E + at, mask=(lane >= low) & (lane < high), other=0.0)
            total += x * x
    tl.store(partial_P + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _sum_in_double_kernel(partial_P, out_ptr, P, ROWS: tl.constexpr):
    total = tl.zeros([ROWS], tl.float64)
    for first in range(0, P, ROWS):
        at = first + tl.arange(0, ROWS)
        total += tl.load(partial_P + at, mask=at < P, other=0.0).to(tl.float64)
    tl.store(out_ptr, tl.sum(total, 0))


@torch.library.custom_op("megapoly::adamw_", mutates_args=("master_E", "exp_avg_E", "exp_avg_sq_E", "params_E"))
def _adamw_op(
    master_E: Tensor, grad_E: Tensor, exp_avg_E: Tensor, exp_avg_sq_E: Tensor, params_E: Tensor | None,
    scale: Tensor | None, block_N: Tensor, low_N: Tensor, high_N: Tensor, decay_N: Tensor, rate_N: Tensor,
    step: int, lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    if len(block_N) == 0:
        return
    with torch.cuda.device_of(master_E):
        # 1 - beta and the bias corrections are taken in float64: 1 - fp32(0.999) would be off in its fifth digit.
        _adamw_kernel[(len(block_N),)](
            master_E, grad_E, exp_avg_E, exp_avg_sq_E, params_E, scale, block_N, low_N, high_N, decay_N, rate_N,
            lr, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, eps,
            BLOCK=BLOCK, PART=PART, num_warps=8,
        )  # fmt: skip


@_adamw_op.register_fake
def _(
    master_E: Tensor, grad_E: Tensor, exp_avg_E: Tensor, exp_avg_sq_E: Tensor, params_E: Tensor | None,
    scale: Tensor | None, block_N: Tensor, low_N: Tensor, high_N: Tensor, decay_N: Tensor, rate_N: Tensor,
    step: int, lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    return None


@torch.library.custom_op("megapoly::squared_norm", mutates_args=())
def _squared_norm_op(x_E: Tensor, block_N: Tensor, low_N: Tensor, high_N: Tensor) -> Tensor:
    if len(block_N) == 0:
        return torch.zeros((), dtype=torch.float64, device=x_E.device)
    out = torch.empty((), dtype=torch.float64, device=x_E.device)
    programs = min(len(block_N), 4 * target_of(x_E).num_sms)  # all of them at once on the machine
    partial_P = torch.empty(programs, dtype=torch.float32, device=x_E.device)
    with torch.cuda.device_of(x_E):
        _squares_kernel[(programs,)](x_E, block_N, low_N, high_N, partial_P, len(block_N), BLOCK=BLOCK, num_warps=8)
        _sum_in_double_kernel[(1,)](partial_P, out, programs, ROWS=1024, num_warps=4)
    return out


@_squared_norm_op.register_fake
def _(x_E: Tensor, block_N: Tensor, low_N: Tensor, high_N: Tensor) -> Tensor:
    return x_E.new_empty((), dtype=torch.float64)


def adamw_reference_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, ranges: RangeTable, *,
    lr: float, beta1: float, beta2: float, eps: float, scale: Tensor | None = None, params: Tensor | None = None,
) -> None:  # fmt: skip
    """The operation by torch's own fused AdamW, range by range; the scale is multiplied into `grad`."""
    found_nan = None
    if scale is not None:
        grad.mul_(scale)
        found_nan = scale.isnan().float()
    for begin, end, weight_decay, lr_scale in ranges.ranges:
        if begin == end:
            continue
        adamw(
            [master[begin:end]], [grad[begin:end]], [exp_avg[begin:end]], [exp_avg_sq[begin:end]], [],
            [torch.full((), float(step - 1), device=master.device)], fused=True, amsgrad=False, maximize=False,
            lr=lr * lr_scale, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, found_inf=found_nan,
        )  # fmt: skip
        if params is not None:
            params[begin:end].copy_(master[begin:end])


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, ranges: RangeTable, *,
    lr: float, beta1: float, beta2: float, eps: float, scale: Tensor | None = None, params: Tensor | None = None,
    backend: str | None = None,
) -> None:  # fmt: skip
    """One AdamW step in place on the entries of the ranges; all others keep their bits.

    master, grad and both moments are flat, contiguous, fp32 and of equal length; `step` counts from 1 (bias
    correction); decay and a factor of lr come from the ranges. `scale`, a scalar on the device, multiplies the
    gradients first and is never waited for; where it is NaN, nothing is updated. `params`, of any floating type,
    receives the updated master weights.
    `grad` may be left scaled.
    `backend`: triton or torch (default: triton on a GPU, torch on a CPU). Source: arXiv 1711.05101, Algorithm 2.
    """
    flat = [master, grad, exp_avg, exp_avg_sq]
    assert all(x.dtype == torch.float32 for x in flat), [x.dtype for x in flat]
    flat += [] if params is None else [params]
    assert all(x.shape == (len(master),) and x.is_contiguous() for x in flat), [x.shape for x in flat]
    assert ranges.end <= len(master), f"ranges end at {ranges.end} of {len(master)}"
    if resolve_backend(backend, master) == "triton":
        _adamw_op(
            master, grad, exp_avg, exp_avg_sq, params, scale,
            ranges.block_N, ranges.low_N, ranges.high_N, ranges.decay_N, ranges.rate_N,
            step, lr, beta1, beta2, eps,
        )  # fmt: skip
    else:
        adamw_reference_(
            master, grad, exp_avg, exp_avg_sq, step, ranges,
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, scale=scale, params=params,
        )  # fmt: skip


def squared_norm_reference(x: Tensor, ranges: RangeTable) -> Tensor:
    """The operation by torch's dot products, on a CPU each of so few entries that fp32 holds their sum well."""
    size = DOT_BLOCK if x.is_cpu else max(len(x), 1)
    blocks = [block for r in ranges.ranges if r.begin < r.end for block in x[r.begin : r.end].split(size)]
    if not blocks:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    return torch.stack([torch.dot(block, block) for block in blocks]).sum(dtype=torch.float64)


def squared_norm(x: Tensor, ranges: RangeTable, backend: str | None = None) -> Tensor:
    """Sum of the squares of the entries of the ranges, an fp64 scalar; the same bits for the same values.

    x is flat, contiguous and fp32. Programs sum in fp32, their results are added in fp64, both in a fixed order.
    `backend`: triton or torch (default: triton on a GPU, torch on a CPU).
    """
    assert x.dtype == torch.float32 and x.dim() == 1 and x.is_contiguous(), (x.dtype, x.shape)
    assert ranges.end <= len(x), f"ranges end at {ranges.end} of {len(x)}"
    if resolve_backend(backend, x) == "triton":
        return _squared_norm_op(x, ranges.block_N, ranges.low_N, ranges.high_N)
    return squared_norm_reference(x, ranges)
