"""FP8 products against exact ones, with bounds from the formats; layers and training with them."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from tiny_runs import tiny_config, tiny_run
from torch import Tensor, nn

from megapoly.errors import ConfigError
from megapoly.model.backends import choose_backends
from megapoly.parallel import products
from megapoly.parallel.fp8 import fp8_product
from megapoly.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megapoly.parallel.mesh import Axis, Mesh
from megapoly.parallel.tensor import Placement
from megapoly.sections import Config, PrecisionConfig
from megapoly.train.step import train_step

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of each entry: half a step of the type at that entry, or at its smallest normal number."""
    info = torch.finfo(dtype)
    smallest = x.abs().max().double() / info.max * info.smallest_normal
    # The quotient by the scale is rounded in the type of x before.
    return info.eps / 2 * (1 + 4 * torch.finfo(x.dtype).eps / info.eps) * x.double().abs().clamp(min=smallest)


def assert_is_product(got: Tensor, a: Tensor, b: Tensor, a_dtype: torch.dtype, added: float | Tensor = 0.0) -> None:
    exact = a.double() @ b.double() + added
    da, db = rounding(a, a_dtype), rounding(b, E4M3)
    bound = da @ b.double().abs() + a.double().abs() @ db + da @ db
    bound += 2 * torch.finfo(got.dtype).eps * (exact.abs() + bound)
    error = (got.double() - exact).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert error.norm() > bound.norm() / 1000, "an exact product is none in FP8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_within_the_formats_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 64), (5, 48), (48, 64)))
    x[:, 0] *= 500  # one feature far beyond the others, as in trained models
    bias = torch.randn(48, generator=generator).to(dtype)
    assert_is_product(fp8_product(x, weight.t()), x, weight.t(), E4M3)
    assert_is_product(fp8_product(x, weight.t(), bias), x, weight.t(), E4M3, bias.double())
    assert_is_product(fp8_product(dy, weight, is_gradient=True), dy, weight, E5M2)
    strided = torch.stack([dy, dy], dim=-1)[..., 0]
    assert torch.equal(fp8_product(strided, weight, is_gradient=True), fp8_product(dy, weight, is_gradient=True))


@pytest.mark.parametrize("is_gradient", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e4, 1e30])
def test_the_scale_follows_the_largest_entry(scale: float, is_gradient: bool) -> None:
    x = scale * (1 + torch.arange(16.0) / 512).repeat(4, 1)  # all within 3% of the largest
    y = fp8_product(x, torch.eye(16), is_gradient=is_gradient)
    assert y[0, -1].item() == pytest.approx(x[0, -1].item(), rel=1e-6)  # the largest entry is exact
    assert (y - x).abs().max() <= 0.04 * scale


def test_activations_keep_more_bits_and_gradients_more_range() -> None:
    tiny = 2.0**-14
    activations = torch.tensor([[torch.finfo(E4M3).max, 1.125, tiny] + [0.0] * 13])  # their scale is 1
    gradients = torch.tensor([[torch.finfo(E5M2).max, 1.125, tiny] + [0.0] * 13])
    assert fp8_product(activations, torch.eye(16))[0, 1:3].tolist() == [1.125, 0.0]
    assert fp8_product(gradients, torch.eye(16), is_gradient=True)[0, 1:3].tolist() == [1.0, tiny]


def test_nothing_stays_nothing_and_infinity_is_seen() -> None:
    assert not fp8_product(torch.zeros(4, 16), torch.ones(16, 16)).any()
    assert fp8_product(torch.tensor([[math.inf] + [1.0] * 15]), torch.ones(16, 16)).isnan().all()


@pytest.mark.parametrize("make", [
    lambda place: ColumnParallelLinear((48, 64), 0, place, bias=True),
    lambda place: RowParallelLinear(64, 48, place, bias=True),
])  # fmt: skip
def test_layers_multiply_in_fp8_but_not_for_weight_gradients(make: Any) -> None:
    place = Placement(Axis("tp"), False, torch.float32, torch.device("cpu"), fp8=True)
    layer, generator = make(place), torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    x, dy = torch.randn((20, 64), generator=generator, requires_grad=True), torch.randn((20, 48), generator=generator)
    y = layer(x)
    y.backward(dy)
    weight = layer.weight.detach()
    assert torch.equal(y, fp8_product(x.detach(), weight.t(), layer.bias.detach()))
    assert torch.equal(x.grad, fp8_product(dy, weight, is_gradient=True))
    assert torch.equal(layer.weight.grad, dy.t() @ x.detach())
    assert torch.equal(layer.bias.grad, dy.sum(0))


SIZES: dict[str, Any] = {"kv_channels": 32, "ffn_hidden_size": 224}  # multiples of 16 on two ranks too
STEPS = 12


def losses_of(mesh: Mesh, cfg: Config) -> tuple[list[float], int]:
    """Losses of a short training, and FP8 products of its first step."""
    run, losses, num_products = tiny_run(mesh, cfg), [], 0
    with mock.patch.object(products, "fp8_product", wraps=products.fp8_product) as product:
        for step in range(1, STEPS + 1):
            sums, counts = train_step(run, step).by_source
            losses.append((sums.sum() / counts.sum()).item())
            num_products = num_products or product.call_count
    return losses, num_products


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_in_fp8_stays_near_training_without(family: str, tmp_path: Path) -> None:
    def losses(tp: int = 1, **leaves: Any) -> tuple[list[float], int]:
        cfg = tiny_config(
            tmp_path, family, STEPS, tensor_model_parallel_size=tp, loss_backend="torch", **SIZES, **leaves
        )
        return run_ranks(losses_of, cfg, tp=tp)[0]

    exact, none = losses()
    assert none == 0
    for leaves in ({}, {"tp": 2, "sequence_parallel": True}):
        rounded, num_products = losses(fp8_recipe="tensorwise", **leaves)
        # Four layers in each of three blocks, forward and backward, for eight micro-batches; the head has none.
        assert num_products == 4 * 3 * 2 * 8
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=0.01)


def test_a_gpu_without_fp8_is_refused_in_one_line() -> None:
    cfg = PrecisionConfig(fp8_recipe="tensorwise")
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA A100-SXM4-80GB"),
        pytest.raises(ConfigError, match=r"8\.9 or above, NVIDIA A100-SXM4-80GB has 8\.0"),
    ):
        choose_backends(cfg, torch.device("cuda"))
    choose_backends(cfg, torch.device("cpu"))
