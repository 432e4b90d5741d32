"""Tensor-parallel linear layers against plain autograd on whole matrices, and the order in which they do their work."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from megapoly.parallel import linear, products
from megapoly.parallel.collectives import all_reduce_
from megapoly.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megapoly.parallel.mesh import Axis, Mesh, single_process_mesh
from megapoly.parallel.tensor import Placement, shard_of, sharded_parameters

HIDDEN, FFN, TOKENS, MICROBATCHES = 7, 12, 20, 2  # four ranks get 3 features and 5 tokens each: chunks of 2, 2 and 1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    sequence_parallel: bool
    overlaps_chunks: bool
    bias: bool
    has_main_grad: bool
    is_deferred: bool
    is_remade: bool
    dtype: torch.dtype

    def place(self, tp: Axis) -> Placement:
        return Placement(tp, self.sequence_parallel, self.dtype, CPU, overlaps_chunks=self.overlaps_chunks)


def cases(tp: int) -> Iterator[Case]:
    manners = [(False, False)] if tp == 1 else [(False, False), (True, False), (True, True)]
    switches = itertools.product(*[(False, True)] * 4)
    for manner, (bias, main_grad, deferred, remade), dtype in itertools.product(
        manners, list(switches), (torch.float32, torch.bfloat16)
    ):
        if main_grad or not deferred:
            yield Case(*manner, bias, main_grad, deferred, remade, dtype)


def drawn(number: int, *shape: int) -> Tensor:
    """The same numbers on every rank, exact in bf16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).bfloat16().double()


class GatedMlp(nn.Module):
    """up [2, FFN, HIDDEN], product of the halves, down: a column and a row layer, as in the model."""

    def __init__(self, case: Case, tp: Axis) -> None:
        super().__init__()
        place = case.place(tp)
        self.up = ColumnParallelLinear((2, FFN, HIDDEN), 1, place, bias=case.bias)
        self.down = RowParallelLinear(FFN, HIDDEN, place, bias=case.bias)
        self.is_remade, self.num_remade = case.is_remade, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x, remake=self.remake(x))
        z = h[:, 0] * h[:, 1]
        return self.down(z, remake=self.remake(z))

    def remake(self, x: Tensor) -> Callable[[], Tensor] | None:
        def again() -> Tensor:
            self.num_remade += 1
            return x.detach().clone()

        return again if self.is_remade else None


def whole_parameters(bias: bool) -> dict[str, Tensor]:
    whole = {"up.weight": drawn(1, 2, FFN, HIDDEN), "down.weight": drawn(2, HIDDEN, FFN)}
    return whole | ({"up.bias": drawn(3, 2, FFN), "down.bias": drawn(4, HIDDEN)} if bias else {})


def expected(bias: bool) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Outputs and input gradients of each micro-batch, and the parameters' summed gradients: plain autograd, fp64."""
    whole = {name: tensor.requires_grad_() for name, tensor in whole_parameters(bias).items()}
    outputs, dxs = [], []
    for number in range(MICROBATCHES):
        x = drawn(10 + number, TOKENS, HIDDEN).requires_grad_()
        h = torch.einsum("th,gfh->tgf", x, whole["up.weight"]) + whole.get("up.bias", 0)
        y = (h[:, 0] * h[:, 1]) @ whole["down.weight"].t() + whole.get("down.bias", 0)
        y.backward(drawn(20 + number, TOKENS, HIDDEN))
        outputs.append(y.detach())
        dxs.append(x.grad)
    return outputs, dxs, {name: tensor.grad for name, tensor in whole.items()}


def part(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a whole parameter."""
    offsets = shard_of(parameter).offsets
    return whole[tuple(slice(o, o + s) for o, s in zip(offsets, parameter.shape, strict=True))]


def give_main_grads(module: nn.Module, counts: dict[str, int]) -> None:
    for name, parameter in module.named_parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
        counts[name] = 0

        def grad_added(name: str = name) -> None:
            counts[name] += 1

        parameter.grad_added = grad_added


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, what: object) -> None:
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error <= 8 * torch.finfo(dtype).eps, f"{what}: {error:.1e}"


def check_case(case: Case, tp: Axis) -> None:
    mlp, counts = GatedMlp(case, tp), dict[str, int]()
    if case.has_main_grad:
        give_main_grads(mlp, counts)
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            parameter.copy_(part(whole_parameters(case.bias)[name], parameter))
    mine = slice(None)
    if case.sequence_parallel:
        mine = slice(tp.rank * TOKENS // tp.size, (tp.rank + 1) * TOKENS // tp.size)
    outputs, dxs, gradients = expected(case.bias)
    queue = mlp.up.place.weight_gradients
    for number in range(MICROBATCHES):
        x = drawn(10 + number, TOKENS, HIDDEN)[mine].to(case.dtype).requires_grad_()
        y = mlp(x)
        assert_near(y, outputs[number][mine], case.dtype, (case, "output"))
        dy = drawn(20 + number, TOKENS, HIDDEN)[mine].to(case.dtype)
        if case.is_deferred:
            with queue.deferred() as waiting:
                y.backward(dy)
            assert len(waiting) == 2
            assert all(counts[name] == number for name in counts if name.endswith("weight"))
            for compute in waiting:
                compute()
        else:
            y.backward(dy)
        assert_near(x.grad, dxs[number][mine], case.dtype, (case, "dx"))
    assert mlp.num_remade == (2 * MICROBATCHES if case.is_remade else 0)
    for name, parameter, (shard,) in sharded_parameters(mlp):
        if case.has_main_grad:
            assert parameter.grad is None and counts[name] == MICROBATCHES, (case, name)
        got = (parameter.main_grad if case.has_main_grad else parameter.grad).float()
        assert_near(all_reduce_(got, tp) if shard.is_partial else got, part(gradients[name], parameter), case.dtype, (case, name))  # fmt: skip


def check_cases(mesh: Mesh) -> None:
    for case in cases(mesh.tp.size):
        check_case(case, mesh.tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gradients_are_those_of_whole_matrices(tp: int) -> None:
    run_ranks(check_cases, tp=tp)


def test_a_weight_gradient_is_added_in_fp32_without_rounding_on_the_way() -> None:
    place = Placement(Axis("tp"), False, torch.bfloat16, CPU)
    layer, x, dy = ColumnParallelLinear((FFN, HIDDEN), 0, place, bias=True), drawn(1, 33, HIDDEN), drawn(2, 33, FFN)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    give_main_grads(layer, {})
    layer(x.bfloat16()).backward(dy.bfloat16())
    for parameter, exact in ((layer.weight, dy.t() @ x), (layer.bias, dy.sum(0))):
        assert (parameter.main_grad - exact).norm() <= 8 * torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    place = Placement(Axis("tp"), False, torch.float32, CPU)
    for layer in (ColumnParallelLinear((3, 5), 0, place, bias=True), RowParallelLinear(5, 3, place, bias=True)):
        nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
        give_main_grads(layer, {})
        x = torch.ones(2, 5, requires_grad=frozen != "input")
        if frozen != "input":
            getattr(layer, frozen).requires_grad_(False)
        layer(x).sum().backward()
        got = {"weight": layer.weight.main_grad, "bias": layer.bias.main_grad, "input": x.grad}
        for name, gradient in got.items():
            assert (gradient is None or not gradient.any()) == (name == frozen), (type(layer), name)


# What is kept, and when things happen


def check_what_is_kept(mesh: Mesh) -> None:
    for remade, manner in itertools.product((False, True), ((False, False), (True, False), (True, True))):
        case = Case(*manner, True, True, False, remade, torch.float32)
        mlp = GatedMlp(case, mesh.tp)
        give_main_grads(mlp, {})
        share = mesh.tp.size if case.sequence_parallel else 1
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(tuple(t.shape)) or t, lambda t: t
        ):
            mlp.up(torch.ones(TOKENS // share, HIDDEN), remake=mlp.remake(torch.ones(1)))
            mlp.down(torch.ones(TOKENS, FFN // mesh.tp.size), remake=mlp.remake(torch.ones(1)))
        assert kept == ([] if remade else [(TOKENS // share, HIDDEN), (TOKENS, FFN // mesh.tp.size)]), case


def test_no_gathered_tensor_is_kept_and_with_remake_nothing() -> None:
    run_ranks(check_what_is_kept, tp=2)


class Recorder:
    """Notes collectives when they start and when they are waited for, and weight gradients."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def collective(self, name: str, start: Callable[..., Any]) -> Callable[..., Any]:
        def started(*args: Any) -> Any:
            work = start(*args)
            self.events.append(name)
            return mock.Mock(wait=lambda: self.events.append(f"{name} done") or work.wait())

        return started

    def weight(self, *args: Any) -> None:
        self.events.append("weight")


def recorded(mesh: Mesh, layer: str, case: Case) -> tuple[list[str], list[str]]:
    """Events of a layer's backward pass, and of its queue."""
    recorder, mlp = Recorder(), GatedMlp(case, mesh.tp)
    give_main_grads(mlp, {})
    sizes = {"up": (TOKENS // mesh.tp.size if case.sequence_parallel else TOKENS, HIDDEN), "down": (TOKENS, FFN // mesh.tp.size)}  # fmt: skip
    y = getattr(mlp, layer)(torch.ones(sizes[layer], requires_grad=True))
    started = {
        name: recorder.collective(name.removeprefix("start_").removesuffix("_"), getattr(products, name))
        for name in ("start_all_reduce_", "start_all_gather", "start_reduce_scatter")
    }
    in_linear = {"start_all_gather": started["start_all_gather"], "accumulate_": recorder.weight}
    with mock.patch.multiple(products, **started), mock.patch.multiple(linear, **in_linear):
        if case.is_deferred:
            with mlp.up.place.weight_gradients.deferred() as waiting:
                y.backward(torch.ones_like(y))
            backward, recorder.events = recorder.events, []
            with mock.patch.object(linear, "all_gather", lambda x, axis: recorder.events.append("gather") or x):
                for compute in waiting:
                    compute()
            return backward, recorder.events
        y.backward(torch.ones_like(y))
    return recorder.events, []


def check_order(mesh: Mesh) -> None:
    def order(layer: str, *, sequence_parallel: bool, overlaps: bool = False, deferred: bool = False) -> Any:
        return recorded(mesh, layer, Case(sequence_parallel, overlaps, False, True, deferred, False, torch.float32))

    reduced, scattered = ("all_reduce", "all_reduce done"), ("reduce_scatter", "reduce_scatter done")
    gathered = ("all_gather", "all_gather done")
    assert order("up", sequence_parallel=False) == ([reduced[0], "weight", reduced[1]], [])
    # The input is gathered again beside the product that gives its gradient; accumulate_ is called with it complete.
    assert order("up", sequence_parallel=True) == (
        [gathered[0], scattered[0], gathered[1], "weight", scattered[1]], []
    )  # fmt: skip
    assert order("up", sequence_parallel=False, deferred=True) == ([*reduced], ["weight"])
    assert order("up", sequence_parallel=True, deferred=True) == ([*scattered], ["gather", "weight"])
    assert order("down", sequence_parallel=False) == (["weight"], [])
    assert order("down", sequence_parallel=True) == ([*gathered, "weight"], [])
    assert order("down", sequence_parallel=True, deferred=True) == ([*gathered], ["weight"])
    # Ten tokens a rank are four chunks: 3, 3, 3 and 1.
    assert order("up", sequence_parallel=True, overlaps=True) == (
        [gathered[0], *[scattered[0]] * 4, gathered[1], "weight", *[scattered[1]] * 4], []
    )  # fmt: skip
    assert order("down", sequence_parallel=True, overlaps=True) == (
        [gathered[0], *[gathered[1], gathered[0]] * 3, gathered[1], "weight"], []
    )  # fmt: skip


def test_the_input_gradients_collective_runs_while_the_weights_gradient_is_computed() -> None:
    run_ranks(check_order, tp=2)


def check_chunks(mesh: Mesh) -> None:
    x, w = drawn(1, 10, 96).float()[:, :64].contiguous() + mesh.tp.rank, drawn(2, 64, 48).float()
    bias = drawn(3, 48).float()
    whole = Placement(mesh.tp, True, torch.float32, CPU)
    chunks = Placement(mesh.tp, True, torch.float32, CPU, overlaps_chunks=True)
    near = dict(rtol=0, atol=64 * torch.finfo(torch.float32).eps * (x.norm(dim=1).max() * w.norm(dim=0).max()).item())
    for added in (None, bias):
        for got, wanted in zip(
            products.gathered_product(x, w, chunks, added, keeps=True), products.gathered_product(x, w, whole, added), strict=True
        ):  # fmt: skip
            torch.testing.assert_close(got, wanted, **near)
    torch.testing.assert_close(
        products.summed_product(x, w, chunks).wait(), products.summed_product(x, w, whole).wait(), **near
    )


def test_chunks_that_overlap_give_the_products_of_whole_tensors() -> None:
    run_ranks(check_chunks, tp=2)


def test_an_odd_vocabulary_is_padded_and_its_padding_stays_zero() -> None:
    assert single_process_mesh().tp.size == 1
