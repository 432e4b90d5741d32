"""The output layer fused with its loss against the float64 formula: chunks, shards, scales, and what is held."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megapoly_kernels import linear_cross_entropy, vocab_parallel_cross_entropy
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapoly.parallel.mesh import Mesh

TOKENS, HIDDEN, VOCAB = 14, 24, 70
SHARD = {1: 80, 2: 48}  # rows of a shard, padding included: 70 = 48 + 22


@dataclass(frozen=True)
class Case:
    """How the operation is called."""

    chunk_tokens: int = 2048
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    recompute: bool = False
    sequence_parallel: bool = False
    has_main_grad: bool = False
    scale: float = 1.0

    def options(self, main_grad: Tensor | None) -> dict[str, Any]:
        return {
            "chunk_tokens": self.chunk_tokens, "label_smoothing": self.label_smoothing, "z_loss": self.z_loss,
            "recompute": self.recompute, "sequence_parallel": self.sequence_parallel, "main_grad": main_grad,
            "vocab_size": VOCAB,
        }  # fmt: skip


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the whole matrix, labels (each shard's ends, two ignored), weights of the losses."""
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))
    labels[:6] = torch.tensor([0, 47, 48, 69, -100, -100])
    grad_T = random(TOKENS, seed=4)
    grad_T[8] = 0.0
    return random(TOKENS, HIDDEN, seed=1), random(VOCAB, HIDDEN, seed=2), labels, grad_T


def expected(case: Case, scale: float = 1.0) -> list[Tensor]:
    """Objective, losses and gradients by the definition, in float64."""
    x, weight, labels, grad_T = example()
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (x @ weight.T).log_softmax(-1)
    is_used = labels != -100
    losses = -(1 - case.label_smoothing) * log_p.gather(1, labels.clamp(0)[:, None])[:, 0]
    losses = losses - case.label_smoothing * log_p.mean(-1) + case.z_loss * (x @ weight.T).logsumexp(-1).square()
    losses = losses * is_used
    objective = (losses * grad_T.double()).sum()
    (objective * scale).backward()
    assert x.grad is not None and weight.grad is not None
    return [objective.detach(), losses.detach(), x.grad, weight.grad]


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype, roundings: float) -> None:
    """Equal within `roundings` of dtype, of the largest entry; NaN never passes."""
    bound = torch.finfo(dtype).eps * roundings * wanted.abs().max().item()
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=0, atol=bound)


def fused(mesh: Mesh, case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Objective, losses, and this rank's gradients of x and of the weight's valid rows."""
    x, weight, labels, grad_T = example()
    begin = mesh.tp.rank * SHARD[mesh.tp.size]
    valid = min(SHARD[mesh.tp.size], VOCAB - begin)
    mine = torch.full((SHARD[mesh.tp.size], HIDDEN), 9.0)  # padding that would win if it counted
    mine[:valid] = weight[begin : begin + valid]
    mine = mine.to(dtype).requires_grad_()
    x = x.to(dtype)
    if case.sequence_parallel:
        x = x.chunk(mesh.tp.size)[mesh.tp.rank].clone()
    leaf = x.requires_grad_()
    main_grad = torch.full(mine.shape, 3.0) if case.has_main_grad else None
    objective, losses = linear_cross_entropy(
        leaf, mine, labels, grad_T, begin, valid, group=mesh.tp.group, **case.options(main_grad)
    )
    assert not losses.requires_grad and losses.dtype == torch.float32 == objective.dtype
    (objective * case.scale).backward()
    if main_grad is None:
        assert mine.grad is not None
        main_grad = mine.grad
    else:
        assert mine.grad is None
        main_grad -= 3.0
    assert leaf.grad is not None and (main_grad[valid:] == 0).all()
    assert leaf.grad.dtype == dtype
    return [objective.detach(), losses, leaf.grad, main_grad[:valid]]


def check(case: Case, tp: int, dtype: torch.dtype = torch.float32, roundings: float = 64) -> None:
    objective, losses, x_grad, weight_grad = expected(case, case.scale)
    parts = run_ranks(fused, case, dtype, tp=tp)
    for part in parts:
        assert torch.equal(part[1], parts[0][1])
        close(part[1], losses, dtype, roundings)
        close(part[0], objective, dtype, 4 * roundings)  # terms of both signs
    x_grads = [part[2] for part in parts]
    for whole in [torch.cat(x_grads)] if case.sequence_parallel else x_grads:
        close(whole, x_grad, dtype, roundings)
    main_grad_roundings = 4 * roundings if case.has_main_grad and dtype == torch.float32 else roundings  # 3 + it - 3
    close(torch.cat([part[3] for part in parts]), weight_grad, dtype, main_grad_roundings)


SMOOTHED = Case(label_smoothing=0.1, z_loss=1e-2)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 14, 2048])
@pytest.mark.parametrize("case", [Case(), SMOOTHED, replace(SMOOTHED, recompute=True)], ids=str)
@pytest.mark.parametrize("has_main_grad", [False, True])
def test_chunks_of_any_size(chunk_tokens: int, case: Case, has_main_grad: bool) -> None:
    check(replace(case, chunk_tokens=chunk_tokens, has_main_grad=has_main_grad), tp=1)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("chunk_tokens", "has_main_grad"), [(4, True), (10, False)])
def test_over_uneven_shards(sequence_parallel: bool, recompute: bool, chunk_tokens: int, has_main_grad: bool) -> None:
    case = replace(SMOOTHED, chunk_tokens=chunk_tokens, has_main_grad=has_main_grad)
    check(replace(case, sequence_parallel=sequence_parallel, recompute=recompute), tp=2)


@pytest.mark.parametrize("case", [Case(scale=3.0), Case(recompute=True, has_main_grad=True, scale=3.0)], ids=str)
def test_a_scale_after_the_objective(case: Case) -> None:
    check(case, tp=1)


def test_main_grad_refuses_a_scale_that_came_too_late() -> None:
    with pytest.raises(ValueError, match="every scale belongs into grad_T"):
        check(Case(has_main_grad=True, scale=2.0), tp=1)


@pytest.mark.parametrize("case", [Case(chunk_tokens=5), Case(chunk_tokens=3, recompute=True, has_main_grad=True)])
def test_bf16(case: Case) -> None:
    check(case, tp=1, dtype=torch.bfloat16, roundings=6)


@pytest.mark.parametrize("has_main_grad", [False, True])
def test_the_weight_gradient_is_summed_in_fp32(has_main_grad: bool) -> None:
    """Many small contributions after a large one: a bf16 sum would lose them."""
    x, weight = torch.ones(65, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    grad_T = torch.full((65,), 2.0)
    grad_T[0] = 1024.0
    main_grad = torch.zeros(2, 1) if has_main_grad else None
    labels = torch.zeros(65, dtype=torch.int64)
    objective, _ = linear_cross_entropy(x, weight, labels, grad_T, 0, 2, main_grad=main_grad, chunk_tokens=1)
    objective.backward()
    got = weight.grad if main_grad is None else main_grad
    assert got is not None and got.flatten().tolist() == [-576.0, 576.0]


class Largest(TorchDispatchMode):
    """The most entries that any tensor made inside has."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("recompute", [False, True])
def test_logits_are_never_whole(recompute: bool) -> None:
    x, weight = random(64, 4, seed=1).requires_grad_(), random(100, 4, seed=2).requires_grad_()
    with Largest() as largest:
        objective, _ = linear_cross_entropy(
            x, weight, torch.zeros(64, dtype=torch.int64), torch.ones(64), 0, 100, chunk_tokens=8, recompute=recompute
        )
        objective.backward()
    assert largest.entries == 800


def count_products(call: Callable[[], Any]) -> int:
    class Products(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += "mm" in func.name()
            return func(*args, **(kwargs or {}))

    with Products() as products:
        call()
    return products.number


def test_no_product_more_than_needed() -> None:
    x, weight, labels, grad_T = example()
    main_grad = torch.zeros(VOCAB, HIDDEN)

    def call(**options: Any) -> Tensor:
        options = {"main_grad": main_grad, "chunk_tokens": 7, **options}
        return linear_cross_entropy(x, weight, labels, grad_T, 0, VOCAB, **options)[0]

    assert count_products(call) == 2  # two chunks, nothing needs a gradient
    weight.requires_grad_()
    with torch.no_grad():
        assert count_products(call) == 2
    assert (main_grad == 0).all()
    assert count_products(call) == 4
    x.requires_grad_()
    assert count_products(lambda: call().backward()) == 6
    assert count_products(lambda: call(recompute=True).backward()) == 8
    weight.requires_grad_(False)
    main_grad.zero_()
    assert count_products(lambda: (call() * 2).backward()) == 4  # a frozen matrix: any scale, and main_grad untouched
    assert (main_grad == 0).all()


def test_same_losses_as_from_logits() -> None:
    x, weight, labels, grad_T = example()
    _, losses = linear_cross_entropy(x, weight, labels, grad_T, 0, 66, z_loss=0.1)
    assert torch.equal(losses, vocab_parallel_cross_entropy(x @ weight.T, labels, 0, 66, z_loss=0.1))


def test_no_tokens_and_labels_that_do_not_match() -> None:
    x, weight, labels, grad_T = example()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    objective, losses = linear_cross_entropy(x[:0], weight, labels[:0], grad_T[:0], 0, VOCAB)
    objective.backward()
    assert objective == 0 and losses.shape == (0,) and weight.grad is not None and (weight.grad == 0).all()
    with pytest.raises(ValueError, match="14 labels for 1 x 13 tokens"):
        linear_cross_entropy(x[:13], weight, labels, grad_T, 0, VOCAB)


@pytest.mark.parametrize("in_place", [False, True])
def test_options_mean_what_they_mean_in_torch(in_place: bool) -> None:
    x, weight, labels, grad_T = example()
    logits, theirs = (x @ weight.T).requires_grad_(), (x @ weight.T).double().requires_grad_()
    losses = vocab_parallel_cross_entropy(logits * 1.0, labels, 0, VOCAB, label_smoothing=0.3, in_place=in_place)
    wanted = torch.nn.functional.cross_entropy(theirs, labels, label_smoothing=0.3, reduction="none")
    close(losses, wanted, torch.float32, 8)
    (grad,) = torch.autograd.grad(losses, logits, grad_T)
    close(grad, torch.autograd.grad(wanted, theirs, grad_T.double())[0], torch.float32, 16)
    assert (grad[labels == -100] == 0).all()
    other = labels.where(labels != -100, 5)
    ignoring_five = vocab_parallel_cross_entropy(logits, other, 0, VOCAB, ignore_index=5)
    assert (ignoring_five == 0).tolist() == (other == 5).tolist()


def smooth_without_size(mesh: Mesh) -> None:
    vocab_parallel_cross_entropy(torch.zeros(1, 4), torch.zeros(1).long(), 0, 4, mesh.tp.group, label_smoothing=0.1)


def test_smoothing_over_ranks_needs_the_size_of_the_vocabulary() -> None:
    with pytest.raises(AssertionError, match="ValueError: label smoothing over several ranks needs vocab_size"):
        run_ranks(smooth_without_size, tp=2)
