"""Rotary attention's kernels against the float64 reference: output and the gradient of the packed QKV buffer."""

from dataclasses import dataclass

import pytest
import torch
from comparison import DTYPES, close, random
from megapoly_kernels import HeadShape, Sequences, launch, rotary_attention, rotary_table
from megapoly_kernels.attention_backward import launch_backward
from megapoly_kernels.attention_forward import launch_forward
from torch import Tensor

HOPPER = launch.Target(arch=90, num_sms=2)  # takes the descriptors of the tensor memory accelerator


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (100,)
    head_dim: int = 64
    groups: int = 1
    queries: int = 1
    rotary_dim: int = 0
    interleaved: bool = False
    window: int | None = None
    alibi: bool = False
    shifted: bool = False  # positions of their own
    scale: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def shape(self) -> HeadShape:
        return HeadShape(self.groups, self.queries, self.head_dim)

    def qkv(self) -> Tensor:
        width = self.groups * (self.queries + 2) * self.head_dim
        return random(self.tokens, width, seed=1, dtype=self.dtype)

    def run(self, qkv_TF: Tensor, backend: str, in_place: bool = False) -> Tensor:
        is_packed = len(set(self.lengths)) > 1
        borders = torch.tensor([0, *self.lengths]).cumsum(0)
        sequences = Sequences.packed(borders, self.tokens) if is_packed else Sequences(self.lengths[0])
        wide = torch.float64 if qkv_TF.dtype == torch.float64 else torch.float32
        cos, sin = rotary_table(256, self.rotary_dim, 100.0) if self.rotary_dim else (None, None)
        slopes = 2.0 ** -torch.arange(1, self.groups * self.queries + 1) if self.alibi else None
        return rotary_attention(
            qkv_TF, self.shape, sequences,
            None if cos is None else cos.to(wide), None if sin is None else sin.to(wide),
            position_T=sequences.positions(self.tokens, qkv_TF.device) + 7 if self.shifted else None,
            interleaved=self.interleaved, window=self.window, alibi_slopes_h=slopes, scale=self.scale,
            in_place=in_place, backend=backend,
        )  # fmt: skip


def check(case: Case) -> None:
    leaf = case.qkv().requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    out, expected = case.run(leaf, "triton"), case.run(wide, "sdpa")
    close(out, expected)
    upstream = random(*out.shape, seed=2, dtype=torch.bfloat16)
    (got,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
    (wanted,) = torch.autograd.grad(expected, wide, upstream.double())
    for a, b in zip(case.shape.split(got), case.shape.split(wanted), strict=True):
        if b.any():
            close(a, b, roundings=6)
        else:  # a query that sees one key: its softmax is constant
            assert a.abs().max() <= 16 * torch.finfo(a.dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(Case(lengths=(37,), head_dim=head_dim, rotary_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(1,), rotary_dim=64),
        Case(lengths=(130,)),
        Case(lengths=(64, 64), rotary_dim=64),  # tiles that end where sequences do
        Case(lengths=(33, 33, 33), rotary_dim=32),
        Case(queries=3, rotary_dim=64),
        Case(lengths=(40,), groups=2, queries=2, rotary_dim=24, interleaved=True),
        Case(lengths=(40,), head_dim=256, rotary_dim=64),
        Case(lengths=(40,), head_dim=128, rotary_dim=64, interleaved=True),
        Case(lengths=(40, 40), rotary_dim=64, shifted=True),
        Case(lengths=(3, 1, 70, 26), queries=2, rotary_dim=64),
        Case(lengths=(3, 1, 70, 26), rotary_dim=64, shifted=True),
        Case(window=1),
        Case(window=40, rotary_dim=64),
        Case(lengths=(50, 50), window=70),
        Case(lengths=(80, 9, 31), window=33, rotary_dim=16),
        Case(groups=2, queries=2, alibi=True),
        Case(lengths=(61, 39), queries=2, alibi=True, window=20, rotary_dim=64),
    ],
    ids=str,
)
def test_sequences_masks_and_rotations(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(200,), head_dim=128, rotary_dim=128),
        Case(lengths=(128, 128), head_dim=64, queries=2),
        Case(lengths=(60, 100, 40), head_dim=128, rotary_dim=64, window=50, alibi=True),
        Case(lengths=(72,), head_dim=256, rotary_dim=64),
        Case(lengths=(34,), head_dim=64),  # rows of the log-sum-exp that TMA cannot address: pointers
    ],
    ids=str,
)
def test_hopper_descriptors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", HOPPER)
    check(Case(**{**vars(case), "dtype": torch.bfloat16}))


def test_half_precision_tiles_on_an_a100() -> None:
    check(Case(lengths=(150, 60), rotary_dim=64, queries=2, dtype=torch.bfloat16))
    check(Case(lengths=(128, 128), head_dim=128, rotary_dim=64, dtype=torch.float16))


@pytest.mark.parametrize("rotary_dim", [0, 64])
def test_a_scale_of_the_scores_in_place_of_the_usual_one(rotary_dim: int) -> None:
    case = Case(lengths=(50, 50), queries=2, rotary_dim=rotary_dim, alibi=True, scale=1 / 64)
    check(case)
    usual = Case(**{**vars(case), "scale": 64**-0.5})
    assert torch.equal(usual.run(case.qkv(), "triton"), Case(**{**vars(case), "scale": None}).run(case.qkv(), "triton"))


def test_the_buffer_is_rotated_in_place_only_if_allowed() -> None:
    case = Case(rotary_dim=64)
    leaf = case.qkv().requires_grad_()
    untouched = leaf * 1.0
    case.run(untouched, "triton").sum().backward()
    assert torch.equal(untouched.detach(), leaf.detach())
    expected, leaf.grad = leaf.grad, None
    own = leaf * 1.0  # a buffer that nobody else reads
    version = own._version
    case.run(own, "triton", in_place=True).sum().backward()
    assert "RotaryAttention" in own.grad_fn.name()  # whoever reads it from now on reads what the kernel wrote
    assert own._version > version and not torch.equal(own.detach(), leaf.detach())
    q, k, v = case.shape.split(own.detach())
    for x, was, is_same in zip((q, k, v), case.shape.split(leaf.detach()), (False, False, True), strict=True):
        assert torch.equal(x[1:], was[1:]) == is_same
        assert torch.equal(x[0], was[0])  # position 0 is turned by nothing
    assert torch.equal(leaf.grad, expected)


def test_another_reader_of_a_rotated_buffer_is_refused() -> None:
    case = Case(rotary_dim=64)
    leaf = case.qkv().requires_grad_()
    own = leaf * 1.0
    squares = (own**2).sum()  # its backward wants the values that were there
    out = case.run(own, "triton", in_place=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + out).backward()


def test_large_scores_and_untouched_padding() -> None:
    case = Case(lengths=(70,))
    qkv = case.qkv() * 40
    out, lse = launch_forward(qkv, None, None, None, None, None, 1, 1, 64, 70, 0, False, 0.125)
    close(out, case.run(qkv.double(), "sdpa"))
    assert torch.isfinite(lse).all()
    d_qkv = launch_backward(
        torch.ones_like(out), qkv, out, lse, None, None, None, None, None, None, 1, 1, 64, 70, 0, False, 0.125
    )  # fmt: skip
    assert torch.isfinite(d_qkv).all()


def test_no_tokens() -> None:
    qkv = torch.empty(0, 3 * 64, requires_grad=True)
    out = rotary_attention(qkv, HeadShape(1, 1, 64), Sequences(16), backend="triton")
    out.sum().backward()
    assert out.shape == (0, 1, 64) and qkv.grad.shape == (0, 192)


def test_a_table_that_is_too_short_is_refused() -> None:
    cos, sin = rotary_table(16, 64, 100.0)
    with pytest.raises(ValueError, match="17 tokens need as many rows"):
        rotary_attention(random(17, 192, seed=0), HeadShape(1, 1, 64), Sequences(17), cos, sin, backend="triton")
