"""What the launchers share: the machine a kernel runs on, and a deterministic sum of partial rows.

A tensor on a CPU can be launched on as well, in two modes that need no GPU: under TRITON_INTERPRET=1 kernels are
interpreted, and inside `megapoly_kernels.report.compile_only` they are compiled for an architecture and not run.
"""

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The GPU a launch is shaped for: `arch` is 10 x its compute capability (80: A100, 90: H100 and H200)."""

    arch: int
    num_sms: int


INTERPRETED = Target(arch=80, num_sms=2)  # few programs, so that each walks over several tiles
_SMS_OF_ARCH = {80: 108, 90: 132}


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (decided when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def target_of(x: Tensor) -> Target:
    """The machine that a launch on x is for."""
    if x.is_cuda:
        return _cuda_target(x.device.index)
    if is_interpreted():
        return INTERPRETED
    arch = triton.runtime.driver.active.get_current_target().arch  # the stand-in driver of compile_only
    return Target(arch, _SMS_OF_ARCH[arch])


def resolve_backend(backend: str | None, x: Tensor) -> str:
    """`backend`, or where it is None: triton on a GPU, torch elsewhere."""
    return backend or ("triton" if x.is_cuda else "torch")


@triton.jit
def _sum_partials_kernel(partial_BPN, out_BN, P, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, P, ROWS):
        at = first + row
        offset = (batch * P + at[:, None]) * N + column[None, :]
        total += tl.load(partial_BPN + offset, mask=(at[:, None] < P) & (column[None, :] < N), other=0.0)
    summed = tl.sum(total, 0)
    tl.store(out_BN + batch * N + column, summed.to(out_BN.dtype.element_ty), mask=column < N)


def sum_partials(partial_BPN: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum fp32 [batch, partials, n] over the partials in a fixed order, as `dtype` [batch, n]."""
    batch, partials, n = partial_BPN.shape
    out_BN = torch.empty((batch, n), dtype=dtype, device=partial_BPN.device)
    columns = 32  # many small programs: the sum is over a few hundred rows only
    with torch.cuda.device_of(partial_BPN):
        _sum_partials_kernel[(triton.cdiv(n, columns), batch)](
            partial_BPN, out_BN, partials, n, ROWS=64, COLUMNS=columns, num_warps=4
        )
    return out_BN
