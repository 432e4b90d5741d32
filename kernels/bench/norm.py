"""Residual add and norm: python kernels/bench/norm.py [--rows 8192 --hidden 2048 --residual bf16 --kind layer]"""

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from formulas import norm_bytes
from harness import Case, Contestant, Inputs, Machine, Run, arguments, by_autograd, compiled, main
from megapoly_kernels import layer_norm, rms_norm
from megapoly_kernels.layer_norm import layer_norm_reference
from megapoly_kernels.rms_norm import rms_norm_reference
from results import Target
from torch import Tensor

EPS = 1e-5


def eager(branch: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
    """What a model in plain torch writes; an fp32 stream is normalised in fp32."""
    stream = residual + branch
    width = (stream.shape[-1],)
    wide = weight.to(stream.dtype)
    if bias:
        return F.layer_norm(stream, width, wide, bias[0].to(stream.dtype), EPS).to(weight.dtype), stream
    return F.rms_norm(stream, width, wide, EPS).to(weight.dtype), stream


def ours(backend: str, kind: str) -> Run:
    """megapoly's operation."""
    function: Any = layer_norm if kind == "layer" else rms_norm
    return lambda inputs: function(*inputs.leaves, EPS, backend=backend)


def liger(kind: str) -> Run:
    """Liger-Kernel: LayerNorm behind an add, RMSNorm fused with it."""
    if kind == "layer":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def layer(inputs: Inputs) -> tuple[Tensor, Tensor]:
            branch, residual, weight, bias = inputs.leaves
            stream = residual + branch
            return LigerLayerNormFunction.apply(stream, weight, bias, EPS).to(weight.dtype), stream

        return layer
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def rms(inputs: Inputs) -> tuple[Tensor, Tensor]:
        branch, residual, weight = inputs.leaves
        return LigerFusedAddRMSNormFunction.apply(branch, residual, weight, EPS, 0.0, "llama", False)

    return rms


def flash_attn(kind: str) -> Run:
    """flash-attn's Triton norm with residual."""
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        branch, residual, weight, *bias = inputs.leaves
        return layer_norm_fn(
            branch, weight, bias[0] if bias else None, residual=residual, eps=EPS, prenorm=True,
            residual_in_fp32=residual.dtype == torch.float32, is_rms_norm=not bias,
        )  # fmt: skip

    return run


def apex(kind: str) -> Run:
    """NVIDIA apex's fused norm behind an add; an fp32 stream takes the function of mixed types."""
    from apex.normalization import fused_layer_norm as norms

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        branch, residual, weight, *bias = inputs.leaves
        stream = residual + branch
        prefix = "" if stream.dtype == weight.dtype else "mixed_dtype_"
        function = getattr(norms, f"{prefix}fused_{kind}_norm_affine")
        return function(stream, weight, *bias, (stream.shape[-1],), EPS), stream

    return run


def apex_fast() -> Run:
    """apex's FastLayerNorm behind an add; it has no RMSNorm."""
    from apex.contrib.layer_norm.layer_norm import FastLayerNormFN

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        branch, residual, weight, bias = inputs.leaves
        stream = residual + branch
        return FastLayerNormFN.apply(stream.to(weight.dtype), weight, bias, EPS, False), stream

    return run


def case(machine: Machine, kind: str, rows: int, hidden: int, residual: str) -> Case:
    """One norm at one shape."""
    stream_dtype = torch.float32 if residual == "fp32" else machine.dtype

    def make(seed: int) -> Inputs:
        new = partial(machine.random, rows, hidden)
        leaves = [new(seed=4 * seed), new(seed=4 * seed + 1, dtype=stream_dtype)]
        leaves += [machine.random(hidden, seed=seed + i, scale=0.1).add_(1.0 - i) for i in range(2)]
        leaves = leaves[: 4 if kind == "layer" else 3]
        grads = [new(seed=4 * seed + 2), new(seed=4 * seed + 3, dtype=stream_dtype)]
        return Inputs([leaf.requires_grad_() for leaf in leaves], grads)

    reference: Any = partial(layer_norm_reference if kind == "layer" else rms_norm_reference, eps=EPS)
    return Case(
        operation=f"{kind} norm",
        shape=f"{rows} x {hidden} bf16, {residual} residual",
        make=make,
        reference=by_autograd(reference),
        work=norm_bytes(rows, hidden, stream_dtype.itemsize),
        unit="TB/s",
        contestants=[
            *(Contestant(f"megapoly {b}", partial(ours, b, kind), b) for b in (*machine.backends, "apex")),
            Contestant("torch eager", lambda: lambda inputs: eager(*inputs.leaves)),
            Contestant("torch.compile", lambda: _compiled(reference, machine)),
            Contestant("Liger-Kernel", partial(liger, kind)),
            Contestant("flash-attn triton", partial(flash_attn, kind)),
            Contestant("apex fused", partial(apex, kind)),
            *([Contestant("apex fast", apex_fast)] if kind == "layer" else []),
        ],
        targets={"forward": [Target("rate", 3.7, gpu="H200")], "backward": [Target("rate", 3.0, gpu="H200")]},
        record="norm",
    )


def _compiled(reference: Any, machine: Machine) -> Run:
    function = compiled(lambda *leaves: reference(*leaves), machine)
    return lambda inputs: function(*inputs.leaves)


def cases(machine: Machine, options: Any) -> list[Case]:
    """LayerNorm at all sizes, RMSNorm at the first number of rows."""
    rows, hidden = ([4], [32]) if machine.smoke else (options.rows, options.hidden)
    return [
        case(machine, kind, r, h, residual)
        for kind in options.kind
        for residual in options.residual
        for r in (rows if kind == "layer" else rows[:1])
        for h in hidden
    ]


if __name__ == "__main__":
    parser = arguments("Times residual add + norm.")
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096, 5120])
    parser.add_argument("--residual", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--kind", nargs="+", default=["layer", "rms"], choices=["layer", "rms"])
    sys.exit(main("norm", parser, cases))
