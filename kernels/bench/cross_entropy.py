"""Cross entropy of given logits: python kernels/bench/cross_entropy.py [--tokens 8192 --vocab 32000]"""

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from formulas import cross_entropy_bytes
from harness import Case, Contestant, Inputs, Machine, Run, arguments, by_autograd, compiled, main
from megapoly_kernels import vocab_parallel_cross_entropy
from results import Target
from torch import Tensor


def ours(backend: str) -> Run:
    """megapoly's operation; the gradient takes the logits' place."""

    def run(inputs: Inputs) -> list[Tensor]:
        (logits_TV,) = inputs.leaves
        vocab = logits_TV.shape[1]
        labels = inputs.other["labels"]
        return [vocab_parallel_cross_entropy(logits_TV, labels, 0, vocab, in_place=True, backend=backend).mean()]

    return run


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """What a model in plain torch writes: the loss of fp32 logits."""
    return F.cross_entropy(logits.float(), labels)


def eager_low(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of the logits as they are."""
    return F.cross_entropy(logits, labels).float()


def one(function: Any) -> Run:
    """A function of logits and labels that returns the mean loss."""
    return lambda inputs: [function(inputs.leaves[0], inputs.other["labels"])]


def liger() -> Run:
    """Liger-Kernel, which makes the gradient in its forward pass, over the logits."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return one(LigerCrossEntropyLoss(reduction="mean"))


def flash_attn() -> Run:
    """flash-attn's Triton loss; the gradient takes the logits' place."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return one(lambda logits, labels: cross_entropy_loss(logits, labels, inplace_backward=True)[0].mean())


def apex() -> Run:
    """NVIDIA apex's xentropy, which keeps fp32 losses and writes over the logits in its backward pass."""
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    no_padding = -100
    return one(lambda x, labels: SoftmaxCrossEntropyLoss.apply(x, labels, 0.0, no_padding, True).mean())


def case(machine: Machine, tokens: int, vocab: int) -> Case:
    """The mean loss of bf16 logits."""

    def make(seed: int) -> Inputs:
        logits_TV = machine.random(tokens, vocab, seed=seed, scale=2.0).requires_grad_()
        labels_T = machine.integers(tokens, vocab, seed)
        return Inputs([logits_TV], [torch.ones((), device=machine.device)], {"labels": labels_T})

    return Case(
        operation="cross entropy",
        shape=f"{tokens} x {vocab} bf16",
        make=make,
        reference=by_autograd(eager),
        work=cross_entropy_bytes(tokens, vocab),
        unit="TB/s",
        contestants=[
            *(Contestant(f"megapoly {b}", partial(ours, b), b, rebuilds=True) for b in machine.backends),
            Contestant("torch eager, fp32", lambda: one(eager)),
            Contestant("torch eager, bf16", lambda: one(eager_low)),
            Contestant("torch.compile", lambda: one(compiled(eager, machine))),
            Contestant("Liger-Kernel", liger, rebuilds=True),
            Contestant("flash-attn triton, in place", flash_attn, rebuilds=True),
            Contestant("apex xentropy", apex, rebuilds=True),
        ],
        directions=("forward", "backward", "both"),
        targets={"both": [Target("percent", 80)]},  # at most 1.25 times what two reads and a write take in a copy
    )


def cases(machine: Machine, options: Any) -> list[Case]:
    """Sizes of the vocabulary, or of a rank's share of it."""
    sizes = [(8, 64)] if machine.smoke else [(options.tokens, vocab) for vocab in options.vocab]
    return [case(machine, *size) for size in sizes]


if __name__ == "__main__":
    parser = arguments("Times cross entropy of given logits.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128000, 256000])
    sys.exit(main("cross_entropy", parser, cases))
