"""Stand-alone rotary over a packed QKV buffer: python kernels/bench/rotary.py [--tokens 16384 --head-dim 128]"""

import sys
from functools import partial
from typing import Any

import torch
from formulas import rotary_bytes
from harness import Case, Contestant, Inputs, Machine, Pair, Run, arguments, by_autograd, compiled, main
from megapoly_kernels import rotary, rotary_table
from megapoly_kernels.rotary import rotary_reference
from results import Target
from torch import Tensor

PERIOD, ROTATED = 3, 2  # query and key of each query, key, value


def ours(backend: str) -> Run:
    """megapoly's operation, one launch over the packed buffer."""

    def run(inputs: Inputs) -> list[Tensor]:
        return [rotary(*inputs.leaves, **inputs.other, period=PERIOD, rotated=ROTATED, backend=backend)]

    return run


def flash_attn() -> Run:
    """flash-attn's rotary, in place over [batch, sequence, 3, heads, head_dim]."""
    from flash_attn.layers.rotary import apply_rotary_emb_qkv_

    def run(inputs: Inputs) -> list[Tensor]:
        return [apply_rotary_emb_qkv_(inputs.leaves[0], inputs.other["cos_SR"], inputs.other["sin_SR"])]

    return run


def liger() -> Run:
    """Liger-Kernel's rotary over queries and keys, each [batch, heads, sequence, head_dim]; values stay untouched."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(inputs: Inputs) -> list[Tensor]:
        q_BSnK, k_BSnK = inputs.leaves
        tables = (inputs.other["cos"], inputs.other["sin"])
        return list(LigerRopeFunction.apply(q_BSnK.transpose(1, 2), k_BSnK.transpose(1, 2), *tables))

    return run


def case(machine: Machine, tokens: int, length: int, hidden: int, head_dim: int) -> Case:
    """Half style, all channels, as many keys as queries."""
    heads = hidden // head_dim
    cos_SR, sin_SR = rotary_table(length, head_dim, 10000.0, machine.device)
    position_T = torch.arange(tokens, dtype=torch.int32, device=machine.device) % length
    options = {"cos_SR": cos_SR, "sin_SR": sin_SR, "position_T": position_T}

    def make(seed: int) -> Inputs:
        new = partial(machine.random, tokens, PERIOD * heads, head_dim)
        return Inputs([new(seed=2 * seed).requires_grad_()], [new(seed=2 * seed + 1)], options)

    def reference(x_TNK: Tensor, **options: Tensor) -> Tensor:
        return rotary_reference(x_TNK, **options, period=PERIOD, rotated=ROTATED)

    def threes_first(x_TNK: Tensor) -> Tensor:
        """[tokens, heads x 3, head_dim] as [batch, sequence, 3, heads, head_dim]."""
        return x_TNK.unflatten(1, (heads, 3)).transpose(1, 2).unflatten(0, (-1, length)).contiguous()

    def packed(inputs: Inputs) -> Inputs:
        leaf = threes_first(inputs.leaves[0].detach()).requires_grad_()
        return Inputs([leaf], [threes_first(inputs.grads[0])], options)

    def unpacked(outputs: list[Tensor], grads: list[Tensor]) -> Pair:
        def back(x: Tensor) -> Tensor:
            return x.flatten(0, 1).transpose(1, 2).flatten(1, 2)

        return [back(x) for x in outputs], [back(x) for x in grads]

    kept: dict[str, Tensor] = {}  # the values, which Liger's rotary does not see

    def queries_and_keys(inputs: Inputs) -> Inputs:
        x, grad = threes_first(inputs.leaves[0].detach()), threes_first(inputs.grads[0])
        kept["values"], kept["d_values"] = x[:, :, 2], grad[:, :, 2]
        leaves = [x[:, :, i].contiguous().requires_grad_() for i in range(2)]
        grads = [grad[:, :, i].contiguous().transpose(1, 2) for i in range(2)]
        doubled = {"cos": torch.cat([cos_SR, cos_SR], -1)[None], "sin": torch.cat([sin_SR, sin_SR], -1)[None]}
        return Inputs(leaves, grads, doubled)

    def with_values(outputs: list[Tensor], grads: list[Tensor]) -> Pair:
        q, k = (x.transpose(1, 2) for x in outputs)
        return unpacked([torch.stack([q, k, kept["values"]], 2)], [torch.stack([*grads, kept["d_values"]], 2)])

    return Case(
        operation="rotary",
        shape=f"{tokens} x {PERIOD * heads} x {head_dim} bf16",
        make=make,
        reference=by_autograd(reference),
        work=rotary_bytes(tokens, PERIOD * hidden),
        unit="TB/s",
        contestants=[
            *(Contestant(f"megapoly {b}", partial(ours, b), b) for b in machine.backends),
            Contestant("torch eager", lambda: lambda i: [reference(*i.leaves, **i.other)]),
            Contestant("torch.compile", lambda: _compiled(reference, machine)),
            Contestant("flash-attn, in place", flash_attn, prepare=packed, restore=unpacked),
            Contestant("Liger-Kernel", liger, prepare=queries_and_keys, restore=with_values),
        ],
        targets={d: [Target("percent", 85)] for d in ("forward", "backward")},
    )


def _compiled(reference: Any, machine: Machine) -> Run:
    function = compiled(reference, machine)
    return lambda inputs: [function(*inputs.leaves, **inputs.other)]


def cases(machine: Machine, options: Any) -> list[Case]:
    """Head dimensions."""
    if machine.smoke:
        return [case(machine, 16, 8, 32, 16)]
    return [case(machine, options.tokens, options.length, options.hidden, d) for d in options.head_dim]


if __name__ == "__main__":
    parser = arguments("Times rotary over a packed QKV buffer.")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    sys.exit(main("rotary", parser, cases))
