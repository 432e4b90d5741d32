"""The model on the kernels: the references' loss and gradients, and a block that torch.compile captures whole."""

import pytest
import torch
from megapoly_kernels import Backends, Sequences, choose, rotary_table
from tiny_runs import FAMILIES
from torch import Tensor

from megapoly.model.block import Block
from megapoly.model.init import initialize
from megapoly.model.loss import masked_losses
from megapoly.model.transformer import Transformer
from megapoly.parallel.mesh import Axis
from megapoly.parallel.stage import Stage
from megapoly.parallel.tensor import Placement
from megapoly.sections import Config, ModelConfig, TrainConfig

CPU = torch.device("cpu")
PLACE = Placement(Axis("tp"), sequence_parallel=False, dtype=torch.float32, device=CPU)
REFERENCES = choose({}, CPU)
KERNELS = Backends("triton", "triton", "triton", "triton", "triton", source="this test")
VOCAB = 211


def loss_and_gradients(
    m: ModelConfig, backends: Backends, granularity: str | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    cfg = Config(model=m, train=TrainConfig(recompute_granularity=granularity))
    model = Transformer(cfg, VOCAB, Stage(0, m.num_layers, has_embedding=True, has_head=True), PLACE, backends)
    initialize(model, seed=3)
    tokens_BS = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.ones(2, 16)
    mask_BS[0, 3] = 0
    objective, losses_BS = masked_losses(model, model(tokens_BS[:, :-1]), tokens_BS[:, 1:], mask_BS, mask_BS.sum())
    objective.backward()
    return objective.detach(), losses_BS, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_gives_the_references_answer(family: str) -> None:
    m = ModelConfig(**(FAMILIES[family] | {"num_layers": 2}))
    objective, losses_BS, gradients = loss_and_gradients(m, KERNELS)
    expected_objective, expected_losses_BS, expected = loss_and_gradients(m, REFERENCES)
    torch.testing.assert_close(objective, expected_objective, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses_BS, expected_losses_BS, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in gradients.items():
        # A gradient that is zero in theory (GPT-2's key bias) is bounded against all of them.
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7 * whole, name


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_what_is_redone_on_the_kernels_gives_the_same_bits(granularity: str) -> None:
    m = ModelConfig(**(FAMILIES["llama"] | {"num_layers": 2}))
    expected, _, expected_gradients = loss_and_gradients(m, KERNELS)
    objective, _, gradients = loss_and_gradients(m, KERNELS, granularity)
    assert torch.equal(objective, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_compile_captures_a_block_whole(family: str) -> None:
    m = ModelConfig(**FAMILIES[family])
    block = Block(m, PLACE, KERNELS)
    generator = torch.Generator().manual_seed(5)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    table = (*rotary_table(16, m.rotary_dim, 10000.0), None) if m.rotary_dim else None
    streams = [torch.randn(32, m.hidden_size, generator=generator) for _ in range(2)]

    def run(call: torch.nn.Module) -> list[Tensor]:
        leaves = [stream.clone().requires_grad_() for stream in streams]
        branch, residual = call(*leaves, Sequences(16), table)
        return [branch, residual, *torch.autograd.grad((branch * residual).sum(), [*leaves, *block.parameters()])]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled), run(block), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
