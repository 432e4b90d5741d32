"""Activations of the MLP: python kernels/bench/activation.py [--rows 16384 --ffn 8192 --gated-ffn 11008]"""

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from formulas import bias_gelu_bytes, gated_bytes
from harness import Case, Contestant, Inputs, Machine, Pair, Run, arguments, by_autograd, compiled, main
from megapoly_kernels import bias_gelu, gated_activation
from megapoly_kernels.activation import bias_gelu_reference, gated_activation_reference
from results import Target
from torch import Tensor

TARGETS = {"forward": [Target("percent", 85)], "backward": [Target("percent", 75)]}


def apart(inputs: Inputs) -> Inputs:
    """Gate and linear as two tensors, the layout that others' SwiGLU takes."""
    (x_T2F,) = inputs.leaves
    halves = [half.detach().clone().requires_grad_() for half in x_T2F.unbind(-2)]
    return Inputs(halves, inputs.grads)


def together(outputs: list[Tensor], grads: list[Tensor]) -> Pair:
    """Their gradients in our layout."""
    return outputs, [torch.stack(grads, -2)]


def liger_swiglu() -> Run:
    """Liger-Kernel's SwiGLU."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda inputs: [LigerSiLUMulFunction.apply(*inputs.leaves)]


def flash_attn_swiglu() -> Run:
    """flash-attn's SwiGLU (jiterator)."""
    from flash_attn.ops.activations import swiglu

    return lambda inputs: [swiglu(*inputs.leaves)]


def one(function: Any, *options: Any) -> Run:
    """A function of the leaves with one output."""
    return lambda inputs: [function(*inputs.leaves, *options)]


def gelu_case(machine: Machine, rows: int, ffn: int) -> Case:
    """Bias and tanh GELU."""

    def make(seed: int) -> Inputs:
        leaves = [machine.random(rows, ffn, seed=2 * seed), machine.random(ffn, seed=seed, scale=0.1)]
        return Inputs([leaf.requires_grad_() for leaf in leaves], [machine.random(rows, ffn, seed=2 * seed + 1)])

    def reference(x_TF: Tensor, bias_F: Tensor) -> Tensor:
        return bias_gelu_reference(x_TF, bias_F, "tanh")

    return Case(
        operation="bias gelu",
        shape=f"{rows} x {ffn} bf16",
        make=make,
        reference=by_autograd(reference),
        work=bias_gelu_bytes(rows, ffn),
        unit="TB/s",
        contestants=[
            *(Contestant(f"megapoly {b}", partial(one, bias_gelu, "tanh", b), b) for b in machine.backends),
            Contestant("torch eager", lambda: one(lambda x, bias: F.gelu(x + bias, approximate="tanh"))),
            Contestant("torch.compile", lambda: one(compiled(reference, machine))),
        ],
        targets=TARGETS,
        record="activation",
    )


def swiglu_case(machine: Machine, rows: int, ffn: int) -> Case:
    """SwiGLU over one tensor [rows, 2, ffn]; others take two."""

    def make(seed: int) -> Inputs:
        x_T2F = machine.random(rows, 2, ffn, seed=2 * seed)
        return Inputs([x_T2F.requires_grad_()], [machine.random(rows, ffn, seed=2 * seed + 1)])

    def reference(x_T2F: Tensor) -> Tensor:
        return gated_activation_reference(x_T2F, None, "swiglu")

    def ours(backend: str) -> Run:
        return lambda inputs: [gated_activation(inputs.leaves[0], None, "swiglu", backend)]

    halves = {"prepare": apart, "restore": together}
    return Case(
        operation="swiglu",
        shape=f"{rows} x 2 x {ffn} bf16",
        make=make,
        reference=by_autograd(reference),
        work=gated_bytes(rows, ffn),
        unit="TB/s",
        contestants=[
            *(Contestant(f"megapoly {b}", partial(ours, b), b) for b in machine.backends),
            Contestant("torch eager", lambda: one(lambda gate, linear: F.silu(gate) * linear), **halves),
            Contestant("torch.compile", lambda: one(compiled(reference, machine))),
            Contestant("Liger-Kernel", liger_swiglu, **halves),
            Contestant("flash-attn", flash_attn_swiglu, **halves),
        ],
        targets=TARGETS,
        record="activation",
    )


def cases(machine: Machine, options: Any) -> list[Case]:
    """Both activations."""
    if machine.smoke:
        return [gelu_case(machine, 4, 32), swiglu_case(machine, 4, 32)]
    return [
        *(gelu_case(machine, rows, ffn) for rows in options.rows for ffn in options.ffn),
        *(swiglu_case(machine, rows, ffn) for rows in options.rows for ffn in options.gated_ffn),
    ]


if __name__ == "__main__":
    parser = arguments("Times bias + GELU and SwiGLU.")
    parser.add_argument("--rows", type=int, nargs="+", default=[16384])
    parser.add_argument("--ffn", type=int, nargs="*", default=[8192])
    parser.add_argument("--gated-ffn", type=int, nargs="*", default=[11008])
    sys.exit(main("activation", parser, cases))
