"""How interpreted kernels are compared with float64: by the rounding of their type."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values, the same for a seed; rounded to dtype."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(actual: Tensor, expected: Tensor, roundings: float = 4, fp32_roundings: float = 64) -> None:
    """||actual - expected|| <= n eps ||expected|| and no entry further off than n eps of the largest; NaN never passes.

    eps is that of actual's type; fp32 gets fp32_roundings, since sums over many terms add theirs.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    eps = torch.finfo(actual.dtype).eps
    bound = eps * (fp32_roundings if actual.dtype == torch.float32 else roundings)
    difference = actual.double() - expected.double()
    assert torch.isfinite(difference).all(), "a value is not finite"
    norm, largest = expected.double().norm().item(), expected.abs().max().item() if expected.numel() else 0.0
    assert difference.norm().item() <= bound * norm, (
        f"relative error {difference.norm().item() / max(norm, 1e-300):.2e}"
    )
    worst = difference.abs().max().item() if expected.numel() else 0.0
    assert worst <= 2 * bound * largest, f"an entry is off by {worst:.2e} of {largest:.2e}"


def gradients(
    operation: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], seed: int = 77
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the inputs) for random upstream gradients.

    The upstreams are bf16 values, so that the operation in any type and its formula in float64 get the same.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = list(operation(*leaves))
    upstream = [random(*o.shape, seed=seed + i, dtype=torch.bfloat16).to(o.dtype) for i, o in enumerate(outputs)]
    return outputs, list(torch.autograd.grad(outputs, leaves, upstream))
