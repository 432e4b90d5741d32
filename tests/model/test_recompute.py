"""What recomputation keeps: exactly the inputs of what is redone; and how a redone function behaves in a graph."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megapoly_kernels import choose
from tiny_runs import model_config
from torch import Tensor

from megapoly.checks import check_recompute
from megapoly.errors import ConfigError
from megapoly.model.init import initialize
from megapoly.model.offload import HostMemory
from megapoly.model.recompute import redone, redone_groups, remade
from megapoly.model.transformer import Transformer
from megapoly.parallel.mesh import Axis
from megapoly.parallel.stage import Stage
from megapoly.parallel.tensor import Placement
from megapoly.sections import Config, TrainConfig

CPU = torch.device("cpu")
PLACE = Placement(Axis("tp"), sequence_parallel=False, dtype=torch.float32, device=CPU)
TOKENS, LAYERS = 32, 4


def middle_stage(family: str, layers: int = LAYERS, **train: Any) -> Transformer:
    """Blocks alone: what they keep is all that is kept."""
    m = model_config(family, num_layers=layers)
    cfg = Config(model=m, train=TrainConfig(**train))
    model = Transformer(cfg, 211, Stage(0, layers, has_embedding=False, has_head=False), PLACE, choose({}, CPU))
    initialize(model, seed=3)
    return model


def kept_sizes(model: Transformer) -> list[int]:
    """Entries of every storage that a forward pass keeps for backward, parameters and tables apart."""
    own = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *(model.table or ())]}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that its address is not used again
        return x

    hidden_tH = torch.randn(TOKENS, model.m.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(torch.zeros(2, TOKENS // 2, dtype=torch.int64), hidden_tH)
    output.backward(torch.ones_like(output))
    return sorted(x.untyped_storage().nbytes() // 4 for x in kept.values())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_selective_keeps_the_inputs_of_norms_attention_and_activation_alone(family: str) -> None:
    m = model_config(family)
    residuals = 1 if m.parallel_residual else 2
    qkv, up = (m.num_attention_heads + 2 * m.num_kv_heads) * m.head_dim, (2 if m.is_gated else 1) * m.ffn_size
    expected = [TOKENS * size for size in (*[m.hidden_size] * residuals, qkv, up)] * LAYERS
    assert kept_sizes(middle_stage(family, recompute_granularity="selective")) == sorted(expected)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("module", ["core_attn", "layernorm", "mlp_act"])
def test_each_module_frees_what_it_makes(family: str, module: str) -> None:
    m = model_config(family)
    made = {"core_attn": m.num_attention_heads * m.head_dim, "layernorm": 2 * m.hidden_size, "mlp_act": m.ffn_size}
    none = kept_sizes(middle_stage(family))
    some = kept_sizes(middle_stage(family, recompute_granularity="selective", recompute_modules=[module]))
    # The plain torch operations keep more within a module than its output, never less.
    assert sum(none) - sum(some) >= TOKENS * made[module] * LAYERS


@pytest.mark.parametrize(("method", "number", "boundaries"), [("uniform", 1, 4), ("uniform", 3, 2), ("block", 2, 2)])
def test_full_keeps_one_residual_stream_a_group(method: str, number: int, boundaries: int) -> None:
    def kept(layers: int, **train: Any) -> list[int]:
        return kept_sizes(middle_stage("llama", layers, **train))

    sizes = kept(LAYERS, recompute_granularity="full", recompute_method=method, recompute_num_layers=number)
    streams = [TOKENS * model_config("llama").hidden_size] * boundaries
    assert sizes == sorted(streams + (kept(LAYERS - number) if method == "block" else []))


def test_groups_cover_the_layers_of_a_chunk_in_order() -> None:
    def groups(layers: int, **train: Any) -> list[tuple[list[int], bool]]:
        return redone_groups(list(range(layers)), TrainConfig(recompute_granularity="full", **train))

    assert groups(5, recompute_num_layers=2) == [([0, 1], True), ([2, 3], True), ([4], True)]
    assert groups(3, recompute_method="block", recompute_num_layers=2) == [([0], True), ([1], True), ([2], False)]
    assert groups(0) == []


def main_gradients(model: Transformer, is_deferred: bool) -> dict[str, Tensor]:
    """What a forward and backward pass adds to main_grad, weights' parts at once or from the queue."""
    for parameter in model.parameters():
        parameter.main_grad, parameter.grad_added = torch.zeros_like(parameter), lambda: None
    hidden_tH = torch.randn(TOKENS, model.m.hidden_size, generator=torch.Generator().manual_seed(5)).requires_grad_()
    output = model(torch.zeros(2, TOKENS // 2, dtype=torch.int64), hidden_tH)
    if is_deferred:
        with model.place.weight_gradients.deferred() as waiting:
            output.square().sum().backward()
        assert len(waiting) == 4 * LAYERS and not model.layers["0"].mlp.up.weight.main_grad.any()
        for compute in waiting:
            compute()
    else:
        output.square().sum().backward()
    gradients = {name: p.main_grad if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert all(gradient.any() for gradient in gradients.values() if gradient.dim() > 1)
    return gradients | {"hidden": hidden_tH.grad}


@pytest.mark.parametrize("train", [{"recompute_granularity": "full"}, {"recompute_granularity": "selective"}])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_deferred_weight_gradients_find_what_is_redone(family: str, train: dict[str, Any]) -> None:
    expected = main_gradients(middle_stage(family), is_deferred=False)
    for name, gradient in main_gradients(middle_stage(family, **train), is_deferred=True).items():
        assert torch.equal(gradient, expected[name]), name


def counted(fn: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], tuple[Tensor]], list[bool]]:
    """fn, and for each call of it whether gradients were on."""
    calls: list[bool] = []

    def call(x: Tensor) -> tuple[Tensor]:
        calls.append(torch.is_grad_enabled())
        return (fn(x),)

    return call, calls


@pytest.mark.parametrize("is_read", [True, False])
def test_a_function_is_redone_once_for_its_backward_and_who_reads_its_output(is_read: bool) -> None:
    fn, calls = counted(lambda x: x.sin())
    x = torch.linspace(-1, 1, 7, requires_grad=True)
    (y,), remake = remade(fn, x * 1)
    assert remake is not None
    again = remake() if is_read else y
    y.backward(torch.ones(7))
    assert calls == [False, True]
    assert torch.equal(x.grad, x.detach().cos()) and torch.equal(again, y)


def test_without_gradients_nothing_is_kept_or_redone() -> None:
    fn, calls = counted(lambda x: x.sin())
    host = HostMemory(CPU)
    with torch.no_grad():
        (y,), remake = remade(fn, torch.ones(3))
        (z,) = redone(fn, torch.ones(3), host=host)
    assert remake is None and y.grad_fn is None and z.grad_fn is None and calls == [False, False]
    assert host.num_buffers == 0


def test_parameters_learn_behind_an_input_that_wants_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    (y,) = redone(lambda x: (weight * x,), torch.tensor([1.0, 2.0, 3.0]))
    y.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.0, 2.0, 3.0]


def test_host_memory_is_used_again_and_bounded_by_what_is_in_flight() -> None:
    host = HostMemory(CPU)
    for _ in range(5):
        parked = [host.park(torch.full((4, 3), float(value))) for value in range(3)]
        fetched = [item.fetch() for item in reversed(parked)]
        assert [x[0, 0].item() for x in fetched] == [2.0, 1.0, 0.0]
        next_parked = [host.park(torch.full((4, 3), -1.0)) for _ in range(3)]
        assert [x.unique().tolist() for x in fetched] == [[2.0], [1.0], [0.0]], "a buffer came back too early"
        for item in next_parked:
            item.fetch()
    assert host.num_buffers == 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"recompute_num_layers": 0}, "recompute_num_layers (0) must be positive"),
        ({"recompute_modules": ["core_attn", "mlp"]}, "must be some of core_attn, layernorm, mlp_act"),
        ({"cpu_offloading": True}, "cpu_offloading needs recompute_granularity full (it is None)"),
    ],
)
def test_what_would_not_be_redone_as_asked_is_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_recompute(TrainConfig(**train))
