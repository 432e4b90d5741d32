"""Causal attention, with rotary and without: python kernels/bench/attention.py [--length 2048 --rotary no]"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from formulas import attention_flops
from harness import Case, Contestant, Inputs, Machine, Pair, Run, arguments, compiled, main
from megapoly_kernels import HeadShape, Sequences, rotary_attention, rotary_table
from megapoly_kernels.rotary import rotary_reference
from megapoly_kernels.rotary_attention import rotary_attention_reference
from results import Target
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# (must, reach) in TFLOP/s on H200 by head_dim and length, for as many keys as queries
FORWARD = {
    128: {2048: (340, 500), 4096: (390, 560), 8192: (420, 600)},
    64: {2048: (320, 370), 4096: (345, 420), 8192: (360, 450)},
}
BACKWARD = {
    128: {2048: (270, 330), 4096: (320, 450), 8192: (350, 520)},
    64: {2048: (260, 380), 4096: (290, 410), 8192: (310, 430)},
}
SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Table = tuple[Tensor, Tensor] | tuple[None, None]


class Alias(torch.autograd.Function):
    """The same memory as a tensor that is no leaf, as a projection's output is none: it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """A new tensor over the storage of x, which autograd takes for no view of it."""
        return x.new_empty(0).set_(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradient as it comes."""
        return grads[0]


def ours(backend: str, shape: HeadShape, length: int, table: Table) -> Run:
    """megapoly's operation from the packed buffer, as the model calls it."""

    def run(inputs: Inputs) -> list[Tensor]:
        qkv_TF = Alias.apply(inputs.leaves[0])
        return [rotary_attention(qkv_TF, shape, Sequences(length), *table, in_place=True, backend=backend)]

    return run


def sdpa(backend: SDPBackend) -> Run:
    """torch's attention with its backend forced, from q, k, v that lie apart."""

    def run(inputs: Inputs) -> list[Tensor]:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return [out.transpose(1, 2)]

    return run


def flash_attn(version: int) -> Run:
    """flash-attn 2, or 3 where its Hopper package is installed, from q, k, v that lie apart."""
    if version == 3:
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func

    def run(inputs: Inputs) -> list[Tensor]:
        out = flash_attn_func(*inputs.leaves, causal=True)
        return [out[0] if isinstance(out, tuple) else out]

    return run


def flash_attn_with_rotary(table: Table) -> Run:
    """flash-attn's rotary in place, then its attention, from a buffer [batch, sequence, 3, heads, head_dim]."""
    from flash_attn import flash_attn_qkvpacked_func
    from flash_attn.layers.rotary import apply_rotary_emb_qkv_

    def run(inputs: Inputs) -> list[Tensor]:
        return [flash_attn_qkvpacked_func(apply_rotary_emb_qkv_(inputs.leaves[0], *table), causal=True)]

    return run


def first_sequence(shape: HeadShape, length: int, table: Table, inputs: Inputs) -> Pair:
    """Outputs and gradients of the first sequence in fp32, a group at a time to keep the scores small."""
    qkv_SgnK = inputs.leaves[0][:length].detach().float().unflatten(1, (shape.groups, -1, shape.head_dim))
    grad_SgnK = inputs.grads[0][:length].float().unflatten(1, (shape.groups, shape.queries))
    position_S = torch.arange(length, device=qkv_SgnK.device)
    hidden_SS = position_S[:, None] < position_S[None, :]
    outputs, grads = [], []
    for group in range(shape.groups):
        leaf = qkv_SgnK[:, group].clone().requires_grad_()
        x_SnK: Tensor = leaf
        if table[0] is not None:
            period = shape.queries + 2
            x_SnK = rotary_reference(leaf, *table, position_S, period=period, rotated=period - 1)
        x_nSK = x_SnK.transpose(0, 1)
        scores_nSS = x_nSK[:-2] @ x_nSK[-2].T * shape.head_dim**-0.5
        out_nSK = scores_nSS.masked_fill(hidden_SS, -torch.inf).softmax(-1) @ x_nSK[-1]
        out_SnK = out_nSK.transpose(0, 1)
        grads += torch.autograd.grad(out_SnK, leaf, grad_SgnK[:, group])
        outputs.append(out_SnK.detach())
    return [torch.cat(outputs, 1)], [torch.stack(grads, 1).flatten(1)]


def case(machine: Machine, shape: HeadShape, batch: int, length: int, has_rotary: bool) -> Case:
    """Attention over `batch` sequences."""
    heads = shape.groups * shape.queries
    table: Table = (None, None)
    if has_rotary:
        table = rotary_table(length, shape.head_dim, 10000.0, machine.device)

    def make(seed: int) -> Inputs:
        width = shape.groups * (shape.queries + 2) * shape.head_dim
        qkv_TF = machine.random(batch * length, width, seed=2 * seed)
        grad = machine.random(batch * length, heads, shape.head_dim, seed=2 * seed + 1)
        return Inputs([qkv_TF.requires_grad_()], [grad])

    targets: dict[str, list[Target]] = {}
    if shape.queries == 1:
        for direction, goals in (("forward", FORWARD), ("backward", BACKWARD)):
            goal = goals.get(shape.head_dim, {}).get(length)
            targets[direction] = [Target("rate", *goal, gpu="H200")] if goal else []
    backends = ("sdpa",) if machine.smoke else ("triton", "sdpa", "flash_attn")
    return Case(
        operation="attention + rotary" if has_rotary else "attention",
        shape=f"{batch} x {length}, {heads} heads of {shape.head_dim}, {shape.groups} groups, bf16",
        make=make,
        reference=partial(first_sequence, shape, length, table),
        work=attention_flops(batch, heads, length, shape.head_dim),
        unit="TFLOP/s",
        contestants=[
            *(Contestant(f"megapoly {b}", partial(ours, b, shape, length, table), b) for b in backends),
            *peers(machine, shape, length, table),
        ],
        targets=targets,
        record="attention",
        part=lambda x: x[:length],
    )


def peers(machine: Machine, shape: HeadShape, length: int, table: Table) -> Iterator[Contestant]:
    """Others' attention; without rotary from q, k, v apart, the layout that suits them."""

    def apart(inputs: Inputs) -> Inputs:
        leaves = [x.detach().unflatten(0, (-1, length)).contiguous() for x in shape.split(inputs.leaves[0])]
        return Inputs([leaf.requires_grad_() for leaf in leaves], [inputs.grads[0].unflatten(0, (-1, length))])

    def together(outputs: list[Tensor], grads: list[Tensor]) -> Pair:
        if not grads:
            return [outputs[0].flatten(0, 1)], []
        q, k, v = (x.flatten(0, 1) for x in grads)
        q = q.unflatten(1, (shape.groups, shape.queries))
        return [outputs[0].flatten(0, 1)], [torch.cat([q, k[:, :, None], v[:, :, None]], 2).flatten(1)]

    def threes_first(inputs: Inputs) -> Inputs:
        x = inputs.leaves[0].detach().unflatten(1, (shape.groups, 3, -1)).transpose(1, 2)
        leaf = x.unflatten(0, (-1, length)).contiguous().requires_grad_()
        return Inputs([leaf], [inputs.grads[0].unflatten(0, (-1, length))])

    def groups_first(outputs: list[Tensor], grads: list[Tensor]) -> Pair:
        return [x.flatten(0, 1) for x in outputs], [x.flatten(0, 1).transpose(1, 2).flatten(1) for x in grads]

    if table[0] is None:
        layout: Any = {"prepare": apart, "restore": together}
        for name, backend in SDPA.items():
            yield Contestant(f"torch SDPA {name}, q k v apart", partial(sdpa, backend), **layout)
        for version in (2, 3):
            yield Contestant(f"flash-attn {version}, q k v apart", partial(flash_attn, version), **layout)
        return

    def build() -> Run:
        function = compiled(partial(rotary_attention_reference, shape=shape, sequences=Sequences(length)), machine)
        return lambda inputs: [function(inputs.leaves[0], cos_SR=table[0], sin_SR=table[1])]

    yield Contestant("torch.compile (rotary + SDPA)", build)
    if shape.queries == 1:
        layout = {"prepare": threes_first, "restore": groups_first}
        yield Contestant("flash-attn 2 (rotary + attention)", partial(flash_attn_with_rotary, table), **layout)


def cases(machine: Machine, options: Any) -> list[Case]:
    """16K tokens at each length; heads of 128 and 64, and 32 heads that share 8 keys."""
    if machine.smoke:
        shapes = [HeadShape(2, 1, 16), HeadShape(2, 2, 16)]
        return [case(machine, shape, 2, 16, rotary) for shape in shapes for rotary in (False, True)]
    shapes = [HeadShape(options.hidden // d, 1, d) for d in options.head_dim]
    if not options.no_gqa:
        shapes.append(HeadShape(8, 4, 128))
    return [
        case(machine, shape, max(1, options.tokens // length), length, has_rotary == "yes")
        for has_rotary in options.rotary
        for shape in shapes
        for length in options.length
    ]


if __name__ == "__main__":
    parser = arguments("Times causal attention, with rotary and without.")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all")
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, nargs="*", default=[128, 64])
    parser.add_argument("--no-gqa", action="store_true", help="leave out 32 heads with 8 groups")
    parser.add_argument("--rotary", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    sys.exit(main("attention", parser, cases))
