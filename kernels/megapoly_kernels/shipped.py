"""The launches that the models make, at their real widths: what `make kernels-report` and the tests compile."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megapoly_kernels.activation import bias_gelu, gated_activation
from megapoly_kernels.adamw import Range, RangeTable, adamw_, squared_norm
from megapoly_kernels.context_attention import LocalChunks, context_attention
from megapoly_kernels.cross_entropy import vocab_parallel_cross_entropy
from megapoly_kernels.dropout import dropout
from megapoly_kernels.layer_norm import layer_norm
from megapoly_kernels.rms_norm import rms_norm
from megapoly_kernels.rotary import rotary
from megapoly_kernels.rotary_attention import HeadShape, Sequences, rotary_attention


@dataclass(frozen=True)
class Case:
    """A named launch of one or more kernels on CPU tensors, inside report.compile_only.

    `spills`: bytes a thread that a kernel may spill, by (kernel, arch), where spilling is the lesser evil; 0 elsewhere.
    """

    name: str
    launch: Callable[[], object]
    spills: dict[tuple[str, int], int] = field(default_factory=dict)


CASES: list[Case] = []


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    """A tensor whose values nobody reads."""
    return torch.empty(shape, dtype=dtype).requires_grad_(grad)


def _adamw(params: torch.dtype | None, scale: torch.dtype | None) -> None:
    length = 1 << 20
    master, grad, exp_avg, exp_avg_sq = (empty(length, dtype=torch.float32) for _ in range(4))
    ranges = RangeTable.build([Range(0, 3 << 18, 0.1), Range(3 << 18, length)], torch.device("cpu"))
    adamw_(
        master, grad, exp_avg, exp_avg_sq, 9, ranges,
        lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, backend="triton",
        scale=None if scale is None else empty(dtype=scale), params=None if params is None else empty(length),
    )  # fmt: skip


def _squared_norm() -> None:
    squared_norm(
        empty(1 << 20, dtype=torch.float32), RangeTable.build([Range(5, 1 << 20)], torch.device("cpu")), "triton"
    )


CASES += [
    Case("adamw bf16 copy, clipped", lambda: _adamw(torch.bfloat16, torch.float64)),
    Case("adamw fp32", lambda: _adamw(None, None)),
    Case("squared_norm", _squared_norm),
]


def _cross_entropy(width: int, valid_rows: int, dtype: torch.dtype, in_place: bool, label_smoothing: float) -> None:
    logits = empty(4, width, dtype=dtype, grad=True)
    labels = torch.zeros(4, dtype=torch.int64)
    vocab_parallel_cross_entropy(
        logits, labels, 0, valid_rows, label_smoothing=label_smoothing, in_place=in_place, backend="triton"
    ).backward(torch.ones(4))


CASES += [
    Case("cross_entropy bf16, 256000", lambda: _cross_entropy(256000, 256000, torch.bfloat16, True, 0.0)),
    Case("cross_entropy bf16, 31003 of 32000", lambda: _cross_entropy(32000, 31003, torch.bfloat16, True, 0.0)),
    Case("cross_entropy bf16, smoothed", lambda: _cross_entropy(32000, 32000, torch.bfloat16, False, 0.1)),
    Case("cross_entropy fp32", lambda: _cross_entropy(32000, 32000, torch.float32, False, 0.0)),
]


def _activation(kind: str, ffn: int, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> None:
    shape = (ffn,) if kind in ("tanh", "none") else (2, ffn)
    bias_F = empty(*shape, dtype=dtype, grad=True) if bias else None
    operation = bias_gelu if kind in ("tanh", "none") else gated_activation
    y = operation(empty(64, *shape, dtype=dtype, grad=True), bias_F, kind, backend="triton")
    y.backward(torch.empty_like(y))


CASES += [
    Case("bias_gelu tanh bf16, 8192", lambda: _activation("tanh", 8192)),
    Case("bias_gelu erf bf16, 20480", lambda: _activation("none", 20480)),
    Case("bias_gelu tanh fp32, 8192", lambda: _activation("tanh", 8192, torch.float32)),
    Case("gated_activation swiglu bf16, 11008", lambda: _activation("swiglu", 11008, bias=False)),
    Case("gated_activation geglu bf16, 8192, bias", lambda: _activation("geglu", 8192)),
    Case("gated_activation swiglu fp32, 11008", lambda: _activation("swiglu", 11008, torch.float32, bias=False)),
]


def _rotary(
    heads: int, head_dim: int, rotary_dim: int, interleaved: bool = False, dtype: torch.dtype = torch.bfloat16
) -> None:
    table = empty(2048, rotary_dim // 2, dtype=torch.float32)
    x, position_T = empty(64, heads, head_dim, dtype=dtype, grad=True), torch.zeros(64, dtype=torch.int32)
    out = rotary(x, table, table, position_T, interleaved=interleaved, period=3, rotated=2, backend="triton")
    out.backward(torch.empty_like(out))


CASES += [
    Case("rotary bf16, 48 x 128", lambda: _rotary(48, 128, 128)),
    Case("rotary bf16, 15 x 128", lambda: _rotary(15, 128, 128)),
    Case("rotary bf16, 12 x 256, 64 turned", lambda: _rotary(12, 256, 64)),
    Case("rotary bf16, 24 x 80, interleaved", lambda: _rotary(24, 80, 80, True)),
    Case("rotary fp32, 48 x 64, interleaved", lambda: _rotary(48, 64, 64, True, torch.float32)),
]


def _norm(kind: str, hidden: int, stream: torch.dtype, other: torch.dtype = torch.bfloat16) -> Case:
    """Forward and backward of a norm after a branch; `stream`: the type of the residual."""

    def launch() -> None:
        streams = empty(64, hidden, dtype=other, grad=True), empty(64, hidden, dtype=stream, grad=True)
        weight = empty(hidden, dtype=other, grad=True)
        if kind == "layer_norm":
            outputs = layer_norm(*streams, weight, empty(hidden, dtype=other, grad=True), 1e-5, backend="triton")
        else:
            outputs = rms_norm(*streams, weight, 1e-5, backend="triton")
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])

    types = " ".join(str(dtype).removeprefix("torch.") for dtype in (stream, other))
    return Case(f"{kind} {hidden} {types}", launch)


CASES += [
    _norm("layer_norm", 2048, torch.bfloat16),
    _norm("layer_norm", 2048, torch.float32),
    _norm("layer_norm", 5120, torch.float32),
    _norm("layer_norm", 8192, torch.float32, torch.float32),
    _norm("rms_norm", 4096, torch.bfloat16),
    _norm("rms_norm", 5120, torch.bfloat16),
    _norm("rms_norm", 8192, torch.float32),
    _norm("layer_norm", 12288, torch.float32),
]


def _attention(
    head_dim: int, rotary_dim: int, *, queries: int = 1, packed: bool = False, window: int | None = None,
    alibi: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    tokens, shape = 1024, HeadShape(4, queries, head_dim)
    qkv_TF = empty(tokens, shape.groups * (queries + 2) * head_dim, dtype=dtype, grad=True)
    table = (empty(2048, rotary_dim // 2, dtype=torch.float32),) * 2 if rotary_dim else (None, None)
    borders = torch.tensor([0, 400, 1024])
    sequences = Sequences.packed(borders, tokens) if packed else Sequences(tokens)
    out_ThK = rotary_attention(
        qkv_TF, shape, sequences, *table, window=window, backend="triton",
        alibi_slopes_h=empty(4 * queries, dtype=torch.float32) if alibi else None,
    )  # fmt: skip
    out_ThK.backward(torch.empty_like(out_ThK))


class _NoExchange:
    """Stands for the other ranks where nothing is run."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def gather(self, x_tF: Tensor) -> Callable[[], Tensor]:
        return lambda: x_tF.new_empty((x_tF.shape[0] * self.ranks, x_tF.shape[1]))

    def scatter(self, x_TF: Tensor) -> Callable[[], Tensor]:
        return lambda: x_TF.new_empty((x_TF.shape[0] // self.ranks, x_TF.shape[1]))


def _context_attention(length: int, head_dim: int, *, queries: int = 1, packed: bool = False) -> None:
    shape, ranks = HeadShape(4, queries, head_dim), 2
    sequences = Sequences.packed(torch.tensor([0, 400, length]), length) if packed else Sequences(length)
    local = LocalChunks.of(sequences, 1, length, (0, 2 * ranks - 1), 2 * ranks, torch.device("cpu"))
    qkv_tF = empty(length // ranks, shape.groups * (queries + 2) * head_dim, grad=True)
    out_thK = context_attention(qkv_tF, shape, local, _NoExchange(ranks), backend="triton")
    out_thK.backward(torch.empty_like(out_thK))


_FORWARD = "attention_forward_kernel"
_KEYS, _QUERIES = "attention_backward_keys_kernel", "attention_backward_queries_kernel"


def _spills(keys_80: int, queries_80: int, keys_90: int, queries_90: int) -> dict[tuple[str, int], int]:
    """What the backward may spill, in bytes a thread: two accumulators fill the registers."""
    return {(_KEYS, 80): keys_80, (_QUERIES, 80): queries_80, (_KEYS, 90): keys_90, (_QUERIES, 90): queries_90}


CASES += [
    Case("rotary_attention 128", lambda: _attention(128, 128), _spills(64, 8, 72, 0)),
    Case(
        "rotary_attention 128, 64 turned, 4 queries a key",
        lambda: _attention(128, 64, queries=4),
        _spills(216, 40, 72, 0),
    ),
    Case("rotary_attention 128, packed", lambda: _attention(128, 128, packed=True), _spills(64, 8, 96, 0)),
    Case(
        "rotary_attention 128, window, ALiBi",
        lambda: _attention(128, 0, window=512, alibi=True),
        _spills(80, 56, 96, 0),
    ),
    Case("rotary_attention 64", lambda: _attention(64, 64)),
    Case("rotary_attention 32, learned positions", lambda: _attention(32, 0), _spills(0, 16, 0, 0)),
    Case("rotary_attention 80", lambda: _attention(80, 80), _spills(80, 16, 0, 16)),
    Case("rotary_attention 256, 64 turned", lambda: _attention(256, 64), _spills(104, 0, 88, 0)),
    Case(
        "rotary_attention 128, fp32",  # no tensor cores: for comparisons, not for speed
        lambda: _attention(128, 128, dtype=torch.float32),
        _spills(0, 16, 0, 16) | {(_FORWARD, 80): 720, (_FORWARD, 90): 400},
    ),
    Case("context_attention 128", lambda: _context_attention(1024, 128), _spills(64, 0, 48, 0)),
    Case(
        "context_attention 128, packed, 4 queries a key",
        lambda: _context_attention(1024, 128, queries=4, packed=True),
        _spills(304, 56, 24, 0),
    ),
    Case("context_attention 64, ragged chunks", lambda: _context_attention(1040, 64), {(_FORWARD, 80): 40}),
]


def _dropout(hidden: int, dtype: torch.dtype) -> None:
    y_tH = dropout(empty(4096, hidden, dtype=dtype, grad=True), empty(4096, dtype=torch.int64), 0.1, 1234, 3, "triton")
    y_tH.backward(torch.empty_like(y_tH))


CASES += [
    Case("dropout 2048", lambda: _dropout(2048, torch.bfloat16)),
    Case("dropout 5120, fp32", lambda: _dropout(5120, torch.float32)),
]
