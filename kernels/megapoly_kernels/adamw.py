"""AdamW over a flat fp32 range (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_reference_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, *,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """The operation by torch's own fused AdamW (one pass over memory on CPU and CUDA alike)."""
    adamw(
        [master], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(float(step - 1), device=master.device)],
        fused=True, amsgrad=False, maximize=False, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, *,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One AdamW step in place over flat fp32 tensors of equal length; `step` counts from 1 (bias correction)."""
    adamw_reference_(
        master, grad, exp_avg, exp_avg_sq, step,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
