"""The launches that the models make, at their real widths: what `make kernels-report` and the tests compile."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
