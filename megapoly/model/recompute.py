"""Activation recomputation: forward passes that backward redoes instead of reading what they would have kept.

Whole blocks (Chen et al. 2016, arXiv 1604.06174), or the parts of a block that are cheap to redo (Korthikanti et al.
2022, arXiv 2205.05198). Nothing here has a state (dropout's masks are a function of the tokens' numbers), so that what
is redone is what was done, collectives included.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from megapoly.model.offload import HostMemory
from megapoly.parallel.linear import Remake
from megapoly.sections import TrainConfig

Outputs = tuple[Tensor, ...]
T = TypeVar("T")


class _Redone(torch.autograd.Function):
    """fn(*inputs) without a graph; one is built when backward, or who reads the first output there, comes."""

    @staticmethod
    def forward(ctx: Any, fn: Callable[..., Outputs], host: HostMemory | None, *inputs: Tensor) -> Outputs:
        ctx.fn, ctx.made, ctx.parked = fn, None, None
        if host is None:
            ctx.save_for_backward(*inputs)
        else:
            ctx.parked = [host.park(x) for x in inputs]
        ctx.set_materialize_grads(False)
        return fn(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        leaves, outputs = _made(ctx)
        ctx.made = None
        wanted = [number for number, grad in enumerate(grads) if grad is not None]
        torch.autograd.backward([outputs[number] for number in wanted], [grads[number] for number in wanted])
        return None, None, *(leaf.grad for leaf in leaves)


def _made(ctx: Any) -> tuple[list[Tensor], Outputs]:
    """Leaves in place of the inputs, and the outputs with a graph from them; fn is done again once, until backward."""
    if ctx.made is None:
        inputs = ctx.saved_tensors if ctx.parked is None else [parked.fetch() for parked in ctx.parked]
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            ctx.made = leaves, ctx.fn(*leaves)
    made: tuple[list[Tensor], Outputs] = ctx.made
    return made


def redone(fn: Callable[..., Outputs], *inputs: Tensor, host: HostMemory | None = None) -> Outputs:
    """fn(*inputs), of which only the inputs are kept, in host memory if given.

    Backward runs fn once more and then its backward pass, which leaves the gradients of parameters as ever. Where no
    gradient is wanted fn just runs.
    """
    if not torch.is_grad_enabled():
        return fn(*inputs)
    # What a frozen embedding gives wants no gradient, but the parameters within fn do.
    inputs = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in inputs)
    outputs: Outputs = _Redone.apply(fn, host, *inputs)
    return outputs


def remade(fn: Callable[..., Outputs], *inputs: Tensor) -> tuple[Outputs, Remake | None]:
    """As redone, for a first output that its reader need not keep either: (outputs, remake).

    In its own backward pass, which comes before, the reader gets it from `remake`; fn is redone once for both.
    """
    outputs = redone(fn, *inputs)
    node = outputs[0].grad_fn
    return outputs, None if node is None else lambda: _made(node)[1][0].detach()


def kept(fn: Callable[..., Outputs], *inputs: Tensor) -> tuple[Outputs, Remake | None]:
    """What stands in for `remade` where nothing is redone."""
    return fn(*inputs), None


def redone_modules(train: TrainConfig) -> frozenset[str]:
    """The parts of a block that are redone: core_attn, layernorm, mlp_act."""
    return frozenset(train.recompute_modules if train.recompute_granularity == "selective" else ())


def redone_groups(layers: Sequence[T], train: TrainConfig) -> list[tuple[Sequence[T], bool]]:
    """The layers of a chunk in runs, each with whether it is redone as a whole.

    Uniform: groups of recompute_num_layers; block: the first recompute_num_layers one by one, the rest not.
    """
    if train.recompute_granularity != "full":
        return [(layers, False)]
    number = train.recompute_num_layers
    if train.recompute_method == "uniform":
        return [(layers[first : first + number], True) for first in range(0, len(layers), number)]
    return [([layer], True) for layer in layers[:number]] + [(layers[number:], False)]
