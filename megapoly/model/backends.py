"""Which implementation of each operation a run takes."""

import torch
from megapoly_kernels import Backends, choose
from megapoly_kernels.backends import CHOICES

from megapoly.errors import ConfigError
from megapoly.sections import PrecisionConfig


def choose_backends(cfg: PrecisionConfig, device: torch.device) -> Backends:
    """Resolve the backend options for a device. Raises ConfigError for one that cannot run there."""
    if cfg.fp8_recipe is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"fp8_recipe ({cfg.fp8_recipe}) needs a GPU of compute capability 8.9 or above, "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: leave it out"
        )
    try:
        return choose({name: getattr(cfg, f"{name}_backend") for name in CHOICES}, device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
