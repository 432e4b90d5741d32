"""The rule that names an implementation: what is asked for, else what was measured on this GPU, else ours."""

import json
from importlib import resources

import pytest
import torch
from megapoly_kernels import backends, choose
from megapoly_kernels.backends import CHOICES

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    return "NVIDIA Test"


def test_a_cpu_takes_the_references() -> None:
    chosen = choose({}, CPU)
    assert (chosen.attention, chosen.norm, chosen.loss, chosen.adamw) == ("sdpa", "torch", "fused_linear", "torch")
    assert choose({"loss": "torch"}, CPU).loss == "torch"
    assert chosen.describe().startswith("kernels: attention sdpa, norm torch,")


def test_an_unmeasured_gpu_takes_our_kernels_and_says_so(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "recorded", dict)
    chosen = choose({}, CUDA)
    assert [getattr(chosen, name) for name in CHOICES] == ["triton", "triton", "triton", "fused_linear", "triton"]
    assert "not measured" in chosen.describe()


def test_a_measured_gpu_takes_what_was_fastest_unless_named(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "recorded", lambda: {gpu: {"attention": "sdpa", "adamw": "torch"}})
    chosen = choose({"adamw": "triton", "norm": "auto"}, CUDA)
    assert (chosen.attention, chosen.norm, chosen.adamw) == ("sdpa", "triton", "triton")
    assert "as measured" in chosen.source


@pytest.mark.parametrize(
    ("requested", "device", "message"),
    [
        ({"attention": "triton"}, CPU, r"attention_backend \(triton\) needs a CUDA GPU"),
        ({"norm": "apex"}, CPU, r"norm_backend \(apex\) needs a CUDA GPU"),
        ({"norm": "sdpa"}, CPU, r"norm_backend \(sdpa\) must be one of auto, triton, torch, apex"),
        ({"norm": "apex"}, CUDA, r"norm_backend \(apex\) needs the package apex"),
        ({"attention": "flash_attn"}, CUDA, r"attention_backend \(flash_attn\) needs the package flash_attn"),
    ],
)
def test_what_cannot_run_is_refused(requested: dict[str, str], device: torch.device, message: str, gpu: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(requested, device)


def test_the_recorded_table_names_known_implementations() -> None:
    table = json.loads(resources.files("megapoly_kernels").joinpath("measured.json").read_text())
    assert table == backends.recorded()
    for chosen in table.values():
        for operation, backend in chosen.items():
            assert backend in CHOICES[operation]
