"""Output matrix and cross entropy: python kernels/bench/linear_cross_entropy.py [--tokens 8192 --vocab 256000]"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from formulas import linear_cross_entropy_flops
from harness import Case, Contestant, Inputs, Machine, Pair, Run, arguments, compiled, main
from megapoly_kernels import linear_cross_entropy, vocab_parallel_cross_entropy
from results import Target
from torch import Tensor

REFERENCE_TOKENS = 1024  # in a part of the reference, whose fp32 logits are large
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def one(loss: Loss) -> Run:
    """A function of hidden states, matrix and labels that returns the mean loss."""
    return lambda inputs: [loss(*inputs.leaves, inputs.other["labels"]).float()]


def with_logits(backend: str) -> Run:
    """megapoly's cross entropy behind a matrix product; its gradient takes the logits' place."""

    def loss(x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
        logits_TV = F.linear(x_TH, weight_VH)
        return vocab_parallel_cross_entropy(
            logits_TV, labels_T, 0, len(weight_VH), in_place=True, backend=backend
        ).mean()

    return one(loss)


def fused(backend: str) -> Run:
    """megapoly's fused operation, which adds the matrix's gradient to an fp32 main gradient."""

    def run(inputs: Inputs) -> list[Tensor]:
        weight_VH, labels_T = inputs.other["weight"], inputs.other["labels"]
        objective, _ = linear_cross_entropy(
            inputs.leaves[0], weight_VH, labels_T, inputs.other["grad_T"], 0, len(weight_VH),
            main_grad=inputs.other["main_grad"], backend=backend,
        )  # fmt: skip
        return [objective]

    return run


def fused_contestant(machine: Machine) -> Contestant:
    """The fused operation; its main gradient is allocated before the clock runs, as a training step's is."""
    last: dict[str, Tensor] = {}

    def prepare(inputs: Inputs) -> Inputs:
        x_TH, weight_VH = inputs.leaves
        last["main_grad"] = torch.zeros_like(weight_VH, dtype=torch.float32, requires_grad=False)
        grad_T = torch.full((len(x_TH),), 1.0 / len(x_TH), device=machine.device)
        other = {"weight": weight_VH, "main_grad": last["main_grad"], "grad_T": grad_T, **inputs.other}
        return Inputs([x_TH], inputs.grads, other)

    def restore(outputs: list[Tensor], grads: list[Tensor]) -> Pair:
        return outputs, [*grads, last.pop("main_grad")]

    build = partial(fused, "torch" if machine.smoke else "triton")
    return Contestant("megapoly fused_linear", build, "fused_linear", prepare, restore)


def eager(x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """What a model in plain torch writes: the loss of fp32 logits."""
    return F.cross_entropy(F.linear(x_TH, weight_VH).float(), labels_T)


def eager_low(x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """The loss of the logits as they are."""
    return F.cross_entropy(F.linear(x_TH, weight_VH), labels_T)


def torch_chunked() -> Run:
    """torch's own function with its chunks (2.13)."""
    options = torch.nn.LinearCrossEntropyOptions()
    return one(partial(F.linear_cross_entropy, options=options))


def liger(**options: Any) -> Run:
    """Liger-Kernel's fused loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="mean", **options)
    return one(lambda x_TH, weight_VH, labels_T: loss(weight_VH, x_TH, labels_T))


def cut_cross_entropy(impl: str) -> Run:
    """Apple's cut-cross-entropy; `cce` drops small gradients, `cce_kahan_full_c` is what it names for pretraining."""
    from cut_cross_entropy import linear_cross_entropy as cut

    return one(partial(cut, impl=impl))


def reference(inputs: Inputs) -> Pair:
    """Loss and gradients in fp32, some tokens at a time."""
    x_TH, weight_VH = (leaf.detach().float() for leaf in inputs.leaves)
    labels_T, tokens = inputs.other["labels"], len(x_TH)
    weight_VH.requires_grad_()
    loss = torch.zeros((), device=x_TH.device)
    x_grads, weight_grad_VH = [], torch.zeros_like(weight_VH)
    for begin in range(0, tokens, REFERENCE_TOKENS):
        part = x_TH[begin : begin + REFERENCE_TOKENS].requires_grad_()
        labels = labels_T[begin : begin + REFERENCE_TOKENS]
        some = F.cross_entropy(F.linear(part, weight_VH), labels, reduction="sum") / tokens
        x_grad, weight_grad = torch.autograd.grad(some, [part, weight_VH])
        x_grads.append(x_grad)
        weight_grad_VH += weight_grad
        loss += some.detach()
    return [loss], [torch.cat(x_grads), weight_grad_VH]


def case(machine: Machine, tokens: int, hidden: int, vocab: int) -> Case:
    """Forward and backward together, with the peak of memory."""

    def make(seed: int) -> Inputs:
        leaves = [machine.random(tokens, hidden, seed=2 * seed), machine.random(vocab, hidden, seed=1, scale=0.02)]
        labels_T = machine.integers(tokens, vocab, seed)
        grads = [torch.ones((), device=machine.device)]
        return Inputs([leaf.requires_grad_() for leaf in leaves], grads, {"labels": labels_T})

    is_goal = (tokens, hidden, vocab) == (8192, 2048, 256000)
    goals = [Target("ms", 42, gpu="H200"), Target("extra_gb", 1.05)] if is_goal else []
    return Case(
        operation="linear + cross entropy",
        shape=f"{tokens} x {hidden} x {vocab} bf16",
        make=make,
        reference=reference,
        work=linear_cross_entropy_flops(tokens, hidden, vocab),
        unit="TFLOP/s",
        contestants=[
            fused_contestant(machine),
            *(Contestant(f"megapoly {b}", partial(with_logits, b), b) for b in machine.backends),
            Contestant("torch eager, fp32 logits", lambda: one(eager)),
            Contestant("torch eager, bf16 logits", lambda: one(eager_low)),
            Contestant("torch.compile", lambda: one(compiled(eager, machine))),
            Contestant("torch linear_cross_entropy", torch_chunked),
            Contestant("Liger-Kernel", liger),
            Contestant("Liger-Kernel, fp32 sums", partial(liger, accum_dtype=torch.float32)),
            Contestant("cut-cross-entropy cce", partial(cut_cross_entropy, "cce")),
            Contestant("cut-cross-entropy kahan_full_c", partial(cut_cross_entropy, "cce_kahan_full_c")),
        ],
        directions=("both",),
        targets={"both": goals},
        under_test="fused_linear",
        record="loss",
        measures_memory=True,
    )


def cases(machine: Machine, options: Any) -> list[Case]:
    """Sizes of the vocabulary, or of a rank's share of it."""
    if machine.smoke:
        return [case(machine, 8, 16, 64)]
    return [case(machine, options.tokens, options.hidden, vocab) for vocab in options.vocab]


if __name__ == "__main__":
    parser = arguments("Times the output matrix with its cross entropy, forward and backward.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, nargs="+", default=[256000])
    sys.exit(main("linear_cross_entropy", parser, cases))
