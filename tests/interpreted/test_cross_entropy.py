"""The cross entropy's kernels against float64 formulas."""

from dataclasses import dataclass

import pytest
import torch
from comparison import DTYPES, close, random
from megapoly_kernels import linear_cross_entropy, vocab_parallel_cross_entropy
from ranks import run_ranks
from torch import Tensor

from megapoly.parallel.mesh import Mesh

IGNORED = -100


@dataclass(frozen=True)
class Kind:
    """The options of a loss."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def options(self) -> dict[str, float]:
        return {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}


KINDS = [Kind(), Kind(label_smoothing=0.1), Kind(z_loss=1e-2), Kind(label_smoothing=0.2, z_loss=1e-3)]


def expected_losses(logits: Tensor, labels: Tensor, kind: Kind) -> Tensor:
    """By the definition: entries' negative log probabilities, weighed by the smoothed target."""
    is_used = labels != IGNORED
    nll = logits.logsumexp(-1, keepdim=True) - logits
    one_hot = torch.nn.functional.one_hot(labels.where(is_used, 0), logits.shape[1])
    weight = (1 - kind.label_smoothing) * one_hot + kind.label_smoothing / logits.shape[1]
    losses = (weight * nll).sum(-1) + kind.z_loss * logits.logsumexp(-1).square()
    return losses * is_used


def example(tokens: int, entries: int, padding: int = 0, *, dtype: torch.dtype, scale: float = 4.0) -> tuple:
    """Logits (padding columns would win if they counted), labels with both ends and ignored ones, upstream."""
    logits = random(tokens, entries + padding, seed=tokens + entries, dtype=dtype, scale=scale)
    logits[:, entries:] = 60.0
    labels = torch.randint(0, entries, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[0] = entries - 1
    if tokens > 4:
        labels[1], labels[3] = 0, IGNORED
    return logits, labels, random(tokens, seed=8)


def check(logits: Tensor, labels: Tensor, upstream: Tensor, entries: int, kind: Kind, in_place: bool) -> None:
    leaf = logits.clone().requires_grad_()
    buffer = leaf * 1.0  # what the layer before would have made
    losses = vocab_parallel_cross_entropy(
        buffer, labels, 0, entries, **kind.options, in_place=in_place, backend="triton"
    )
    wide = logits[:, :entries].double().requires_grad_()
    expected = expected_losses(wide, labels, kind)
    assert losses.dtype == torch.float32
    close(losses, expected)
    kept = buffer.detach().clone()
    losses.backward(upstream)
    expected.backward(upstream.double())
    assert leaf.grad is not None and wide.grad is not None and leaf.grad.dtype == logits.dtype
    assert torch.equal(buffer.detach(), leaf.grad if in_place else kept)
    assert (leaf.grad[:, entries:] == 0).all() and (leaf.grad[labels == IGNORED] == 0).all()
    close(leaf.grad[:, :entries], wide.grad, roundings=1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "entries", "padding"), [(1, 33, 0), (5, 80, 7), (37, 200, 56), (5, 128, 0)])
def test_loss_and_gradient(dtype: torch.dtype, tokens: int, entries: int, padding: int, kind: Kind) -> None:
    logits, labels, upstream = example(tokens, entries, padding, dtype=dtype)
    check(logits, labels, upstream, entries, kind, in_place=tokens != 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("entries", "padding"), [(4096, 0), (8193, 6), (12000, 500)])
def test_several_tiles_a_row(dtype: torch.dtype, entries: int, padding: int) -> None:
    logits, labels, upstream = example(5, entries, padding, dtype=dtype)
    labels[2] = 4096 if entries > 4096 else 4095
    for where, kind in enumerate((Kind(), Kind(label_smoothing=0.3, z_loss=1e-2))):
        logits[4, -padding - 1 - 4000 * where] = 90.0  # the maximum comes late
        check(logits, labels, upstream, entries, kind, in_place=bool(where))


def test_large_logits_and_forbidden_entries() -> None:
    logits, labels, upstream = example(5, 5000, dtype=torch.float32)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, :4999], labels[2] = -torch.inf, 4999  # whole lanes and tiles of -inf
    logits[4, 1:], labels[4] = -torch.inf, 0
    wide = logits.double().requires_grad_()
    leaf = logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf, labels, 0, 5000, backend="triton")
    expected = wide.logsumexp(-1) - wide.gather(1, labels.clamp(0)[:, None])[:, 0]
    expected = torch.where(labels == IGNORED, 0.0, expected)
    for got, want in zip(losses.tolist(), expected.tolist(), strict=True):
        assert got == pytest.approx(want, rel=2e-4)  # 1e4 has a rounding of 1e-3 in fp32
    (grad,) = torch.autograd.grad(losses, leaf, upstream)
    (expected_grad,) = torch.autograd.grad(expected, wide, upstream.double())
    close(grad, expected_grad, fp32_roundings=2e4)


def test_tokens_without_gradient_are_not_read() -> None:
    logits, labels, upstream = example(6, 40, dtype=torch.float32)
    upstream[2] = 0.0
    logits[2:4] = torch.nan  # token 3 is ignored
    leaf = logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf, labels, 0, 40, z_loss=0.1, backend="triton")
    assert losses[3] == 0 and losses[[0, 1, 4, 5]].isfinite().all()
    (grad,) = torch.autograd.grad(losses, leaf, upstream)
    assert (grad[2:4] == 0).all() and grad.isfinite().all()


def test_other_ignored_label_and_labels_of_32_bits() -> None:
    logits, labels, _ = example(6, 40, dtype=torch.bfloat16)
    mine = vocab_parallel_cross_entropy(logits, labels, 0, 40, backend="triton")
    labels[3], labels[4] = 7, 12
    other = vocab_parallel_cross_entropy(logits, labels.int(), 0, 40, ignore_index=7, backend="triton")
    assert other[3] == 0 and mine[3] == 0
    assert torch.equal(mine[:3], other[:3]) and other[4] != 0


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_of_any_stride(in_place: bool) -> None:
    logits, labels, upstream = example(5, 77, dtype=torch.bfloat16)
    whole = torch.full((5, 90), 50.0, dtype=torch.bfloat16)
    whole[:, 5:82] = logits
    losses = []
    for x in (logits.clone(), whole[:, 5:82], logits.t().contiguous().t()):
        leaf = x.detach().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf, labels, 0, 77, in_place=in_place, backend="triton")
        loss.backward(upstream)
        assert leaf.grad is not None
        losses.append((loss.detach(), leaf.grad.clone()))
    for loss, grad in losses[1:]:
        assert torch.equal(loss, losses[0][0]) and torch.equal(grad, losses[0][1])
    assert (whole[:, :5] == 50).all() and (whole[:, 82:] == 50).all()


def test_upstream_of_one_number_and_no_tokens() -> None:
    logits, labels, _ = example(5, 40, dtype=torch.float32)
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    vocab_parallel_cross_entropy(leaf, labels, 0, 40, backend="triton").mean().backward()
    expected_losses(wide, labels, Kind()).mean().backward()
    close(leaf.grad, wide.grad)
    empty = torch.zeros(0, 40, requires_grad=True)
    losses = vocab_parallel_cross_entropy(empty, labels[:0], 0, 40, backend="triton")
    losses.sum().backward()
    assert losses.shape == (0,) and empty.grad.shape == (0, 40)


def test_gradient_in_place_serves_once() -> None:
    leaf = random(3, 20, seed=1).requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf * 1.0, torch.tensor([1, 2, 3]), 0, 20, in_place=True, backend="triton")
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


SHARDS = {0: (0, 48), 1: (48, 22), 2: (70, 0)}  # first row, valid rows of 48: uneven, and one of padding alone


def loss_of_shards(mesh: Mesh, logits: Tensor, labels: Tensor, upstream: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    first, valid = SHARDS[mesh.tp.rank]
    mine = torch.full((len(logits), 48), 70.0, dtype=logits.dtype)
    mine[:, :valid] = logits[:, first : first + valid]
    leaf = mine.requires_grad_()
    losses = vocab_parallel_cross_entropy(
        leaf, labels, first, valid, mesh.tp.group, **kind.options, vocab_size=70, backend="triton"
    )
    losses.backward(upstream)
    assert leaf.grad is not None and (leaf.grad[:, valid:] == 0).all()
    return losses.detach(), leaf.grad[:, :valid]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=str)
def test_over_three_ranks(kind: Kind) -> None:
    logits, labels, upstream = example(6, 70, dtype=torch.bfloat16)
    labels[4], labels[5] = 47, 48
    wide = logits.double().requires_grad_()
    expected = expected_losses(wide, labels, kind)
    expected.backward(upstream.double())
    parts = run_ranks(loss_of_shards, logits, labels, upstream, kind, tp=3)
    for losses, _ in parts:
        assert torch.equal(losses, parts[0][0])
        close(losses, expected)
    assert wide.grad is not None
    close(torch.cat([grad for _, grad in parts], 1), wide.grad, roundings=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_with_the_linear_layer(dtype: torch.dtype, recompute: bool) -> None:
    kind = KINDS[3]
    x, weight = random(7, 24, seed=1, dtype=dtype), random(56, 24, seed=2, dtype=dtype)
    _, labels, upstream = example(7, 50, dtype=dtype)
    leaves, wide = [[t.detach().clone().to(d).requires_grad_() for t in (x, weight)] for d in (dtype, torch.float64)]
    objective, losses = linear_cross_entropy(
        *leaves, labels, upstream, 0, 50, chunk_tokens=3, recompute=recompute, **kind.options, backend="triton"
    )
    objective.backward()
    expected = expected_losses(wide[0] @ wide[1][:50].T, labels, kind)
    (expected * upstream).sum().backward()
    close(losses, expected, fp32_roundings=64 if dtype == torch.float32 else 2e5)
    for leaf, of in zip(leaves, wide, strict=True):
        assert leaf.grad is not None and of.grad is not None
        close(leaf.grad, of.grad, roundings=3)
