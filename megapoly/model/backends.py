"""Which implementation of each operation a run takes."""

import torch
from megapoly_kernels import Backends, choose
from megapoly_kernels.backends import CHOICES

from megapoly.errors import ConfigError
from megapoly.sections import PrecisionConfig


def choose_backends(cfg: PrecisionConfig, device: torch.device) -> Backends:
    """Resolve the backend options for a device. Raises ConfigError for one that cannot run there."""
    try:
        return choose({name: getattr(cfg, f"{name}_backend") for name in CHOICES}, device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
