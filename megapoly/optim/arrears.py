"""Numbers of the device that the host reads later, when it has given the device more to do."""

import torch
from torch import Tensor


class Arrears:
    """A copy of a few numbers on its way to the host: reading waits for what was asked of the device before it only."""

    def __init__(self, x: Tensor) -> None:
        self._event = torch.cuda.Event() if x.is_cuda else None
        if self._event is None:
            self._copy = x.detach().clone()
        else:
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._copy.copy_(x.detach(), non_blocking=True)
            self._event.record()

    def read(self) -> list[float]:
        """The numbers, flat."""
        if self._event is not None:
            self._event.synchronize()
        return [float(number) for number in self._copy.flatten().tolist()]
