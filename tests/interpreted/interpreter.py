"""Triton's interpreter made safe for bf16.

It keeps bf16 as uint16 bit patterns: casts from fp32 truncate, and arithmetic, reductions and dots work on the patterns
and give nonsense without a word (triton issue 11584, not supported upstream). Our kernels compute in fp32 and use bf16
to load, store and feed tl.dot. So two things are repaired (casts round to nearest even as a GPU does; dots multiply
values), and any other arithmetic on bf16 raises.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _refuse(*handles: Any) -> None:
    if any(isinstance(handle, TensorHandle) and _is_bf16(handle) for handle in handles):
        raise TypeError("a kernel computes in bf16, which the interpreter gets wrong: cast to fp32 first")


def _cast(self: InterpreterBuilder, source: TensorHandle, dtype: Any, *_: Any) -> TensorHandle:
    target = dtype.scalar
    if source.dtype.scalar == target:
        return source
    data = bf16_to_fp32(source.data) if _is_bf16(source) else source.data
    if target == tl.bfloat16:
        return TensorHandle(fp32_to_bf16(data), target)
    return TensorHandle(data.astype(interpreter._get_np_dtype(target)), target)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
    # fp16 goes through fp32 as well: numpy has no fast product for it.
    values = [bf16_to_fp32(x.data) if _is_bf16(x) else x.data.astype(np.float32) for x in (a, b)]
    return TensorHandle(np.matmul(*values).astype(d.data.dtype) + d.data, d.dtype.scalar)


def repair() -> None:
    """Patch the interpreter, once a process."""
    guarded = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_fabs")
    for name in guarded:
        original = getattr(InterpreterBuilder, name)

        def checked(self: Any, *arguments: Any, original: Any = original, **options: Any) -> Any:
            _refuse(*arguments)
            return original(self, *arguments, **options)

        setattr(InterpreterBuilder, name, checked)
    original_reduce = ReduceOps.apply_impl

    def reduce(self: ReduceOps, inputs: Any) -> Any:
        _refuse(*(x.handle for x in (inputs if isinstance(inputs, tuple) else (inputs,))))
        return original_reduce(self, inputs)

    ReduceOps.apply_impl = reduce
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _cast
    InterpreterBuilder.create_dot = _dot
