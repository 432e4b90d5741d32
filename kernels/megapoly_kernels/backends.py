"""Which implementation of each operation runs.

One rule: what is named is taken. `auto` is the reference on a CPU, the head with its loss in chunks; on a GPU it
is what the recorded measurements of that GPU say (measured.json, written by `make bench-record`), and our kernels where
it was never measured.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import torch

CHOICES = {
    "attention": ("triton", "sdpa", "flash_attn"),
    "norm": ("triton", "torch", "apex"),
    "activation": ("triton", "torch"),
    "loss": ("fused_linear", "triton", "torch"),
    "adamw": ("triton", "torch"),
}
_ON_CPU = {"attention": "sdpa", "norm": "torch", "activation": "torch", "loss": "fused_linear", "adamw": "torch"}
_ON_CUDA = {name: choices[0] for name, choices in CHOICES.items()}
# PyPI has another package named apex: NVIDIA's is the one with norms.
_MODULES = {"flash_attn": "flash_attn", "apex": "apex.normalization"}


@dataclass(frozen=True)
class Backends:
    """The implementation of each operation, and where the choice of `auto` comes from."""

    attention: str
    norm: str
    activation: str
    loss: str
    adamw: str
    source: str

    def describe(self) -> str:
        """One line for the log."""
        chosen = ", ".join(f"{name} {getattr(self, name)}" for name in CHOICES)
        return f"kernels: {chosen} ({self.source})"


def recorded() -> dict[str, dict[str, str]]:
    """The fastest implementation by operation, by name of the GPU."""
    text = resources.files("megapoly_kernels").joinpath("measured.json").read_text()
    table: dict[str, dict[str, str]] = json.loads(text)
    return table


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is absent
        return False


def choose(requested: Mapping[str, str], device: torch.device) -> Backends:
    """Resolve a name or `auto` for every operation. Raises ValueError for what cannot run on this device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        table = recorded().get(name)
        automatic = _ON_CUDA | (table or {})
        source = f"{name}: {'as measured' if table else 'not measured yet, make bench-record does'}"
    else:
        automatic, source = _ON_CPU, "CPU: references"
    chosen = {}
    for operation, choices in CHOICES.items():
        backend = requested.get(operation, "auto")
        backend = automatic[operation] if backend == "auto" else backend
        if backend not in choices:
            raise ValueError(f"{operation}_backend ({backend}) must be one of auto, {', '.join(choices)}")
        if device.type != "cuda" and backend in ("triton", *_MODULES):
            raise ValueError(f"{operation}_backend ({backend}) needs a CUDA GPU; this is the CPU: use auto")
        if backend in _MODULES and not _is_importable(_MODULES[backend]):
            raise ValueError(f"{operation}_backend ({backend}) needs the package {_MODULES[backend]}; use auto")
        chosen[operation] = backend
    return Backends(**chosen, source=source)
