"""Attention of a part of the queries to all keys: the kernels of every rank together against float64 attention."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from comparison import close, random
from megapoly_kernels import (
    HeadShape,
    LocalChunks,
    Sequences,
    context_attention,
    launch,
    rotary_attention,
    rotary_table,
)
from megapoly_kernels.rotary_attention import rotated
from torch import Tensor


@dataclass(frozen=True)
class WholeKeys:
    """An exchange for one process that plays the ranks in turn: it hands out the keys and values of all.

    Keys and values of the other ranks are `kv_TF`, of which autograd knows nothing. A rank gets its own part of what is
    to be summed; what it has for the others is kept in `sums_TF`.
    """

    kv_TF: Tensor
    own_t: Tensor
    sums_TF: Tensor

    def gather(self, x_tF: Tensor) -> Callable[[], Tensor]:
        assert x_tF.is_contiguous() and x_tF.shape[0] == len(self.own_t)
        return lambda: self.kv_TF.index_copy(0, self.own_t, x_tF)

    def scatter(self, x_TF: Tensor) -> Callable[[], Tensor]:
        self.sums_TF.add_(x_TF.index_fill(0, self.own_t, 0).to(self.sums_TF.dtype))
        return lambda: x_TF[self.own_t]


@dataclass(frozen=True)
class Case:
    ranks: int = 2
    batch: int = 1
    length: int = 96
    documents: tuple[int, ...] = ()  # lengths, over the flat batch
    head_dim: int = 64
    groups: int = 1
    queries: int = 1
    rotary_dim: int = 0
    scale: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> HeadShape:
        return HeadShape(self.groups, self.queries, self.head_dim)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def sequences(self) -> Sequences:
        if not self.documents:
            return Sequences(self.length)
        return Sequences.packed(torch.tensor([0, *self.documents]).cumsum(0), self.tokens)

    def chunks(self, rank: int) -> LocalChunks:
        chunks = (rank, 2 * self.ranks - 1 - rank)
        return LocalChunks.of(self.sequences, self.batch, self.length, chunks, 2 * self.ranks, torch.device("cpu"))

    def table(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        if not self.rotary_dim:
            return None, None
        cos, sin = rotary_table(self.length, self.rotary_dim, 100.0)
        return cos.to(dtype), sin.to(dtype)


def of_all_ranks(case: Case, qkv_TF: Tensor, upstream_ThK: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Output and gradient of the packed buffer for all tokens, from one rank's share after the other."""
    shape, table = case.shape, case.table(torch.float32)
    whole_position_T = case.sequences.positions(case.tokens, qkv_TF.device)
    out_ThK = torch.full_like(upstream_ThK, torch.nan)
    d_qkv_TF = torch.full(qkv_TF.shape, torch.nan, dtype=torch.float64)
    sums_TF = torch.zeros(case.tokens, case.groups * 2 * case.head_dim, dtype=torch.float64)

    def rotated_keys(x_TF: Tensor) -> Tensor:
        x_TF = rotated(x_TF, shape, case.sequences, *table, whole_position_T, False)
        return x_TF.unflatten(-1, (shape.groups, -1, shape.head_dim))[:, :, shape.queries :].flatten(1)

    for rank in range(case.ranks):
        local = case.chunks(rank)
        own_t = local.own_t.long()
        leaf = qkv_TF[own_t].clone().requires_grad_()
        exchange = WholeKeys(rotated_keys(qkv_TF), own_t, sums_TF)
        out = context_attention(leaf, shape, local, exchange, *table, scale=case.scale, backend=backend)
        (d_qkv_TF[own_t],) = (x.double() for x in torch.autograd.grad(out, leaf, upstream_ThK[own_t]))
        out_ThK[own_t] = out.detach()
    # The sums are those of rotated keys: turn them back by the transpose, which autograd has.
    leaf = qkv_TF.double().requires_grad_()
    table = case.table(torch.float64)
    (d_kv_TF,) = torch.autograd.grad(rotated_keys(leaf), leaf, sums_TF)
    return out_ThK, d_qkv_TF + d_kv_TF


def check(case: Case, backend: str = "triton") -> None:
    qkv_TF = random(case.tokens, case.groups * (case.queries + 2) * case.head_dim, seed=1, dtype=case.dtype)
    upstream = random(case.tokens, case.groups * case.queries, case.head_dim, seed=2, dtype=torch.bfloat16)
    out, d_qkv = of_all_ranks(case, qkv_TF, upstream.to(case.dtype), backend)
    wide = qkv_TF.double().requires_grad_()
    expected = rotary_attention(
        wide, case.shape, case.sequences, *case.table(torch.float64), scale=case.scale, backend="sdpa"
    )
    close(out, expected)
    (wanted,) = torch.autograd.grad(expected, wide, upstream.double())
    for a, b in zip(case.shape.split(d_qkv.to(case.dtype)), case.shape.split(wanted), strict=True):
        close(a, b, roundings=6)


CASES = [
    Case(),
    Case(ranks=3, length=138, rotary_dim=64),
    Case(batch=3, length=36, queries=3),
    Case(batch=2, length=128, rotary_dim=32),  # chunks that end where tiles do
    Case(length=64, head_dim=16, scale=1 / 16),
    Case(documents=(1, 40, 1, 30, 23, 1), rotary_dim=64),
    Case(ranks=3, batch=2, length=78, documents=(78, 3, 1, 44, 30), groups=2, queries=2, rotary_dim=64),
    Case(ranks=3, length=198, head_dim=80, documents=(97, 101)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case) -> None:
    check(case, "sdpa")


HALF = [
    Case(length=264, head_dim=128, rotary_dim=128, queries=2),
    Case(length=512, head_dim=64),
    Case(length=328, head_dim=128, documents=(100, 1, 150, 77), dtype=torch.float16),
    Case(length=144, head_dim=256, rotary_dim=64),
]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision_tiles(case: Case, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", launch.Target(arch, num_sms=2))
    check(replace(case, dtype=torch.bfloat16) if case.dtype == torch.float32 else case)
