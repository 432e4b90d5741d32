"""Activations that wait in host memory between forward and backward."""

import contextlib
from collections import defaultdict

import torch
from torch import Tensor


class HostMemory:
    """Pinned buffers, used again and again, and a stream of its own that fills and reads them beside the computation.

    The host waits for nothing. On a CPU the same copies are made; they save no memory there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_buffers = 0
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._latest: Parked | None = None

    def park(self, x: Tensor) -> "Parked":
        """Copy a tensor to the host; what was parked before it will be fetched after it."""
        free = self._free[x.shape, x.dtype]
        if not free:
            self.num_buffers += 1
            free.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=self.stream is not None))
        buffer = free.pop()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            x.record_stream(self.stream)
        with self.aside():
            buffer.copy_(x, non_blocking=True)
        self._latest = Parked(self, buffer, self._latest)
        return self._latest

    def aside(self) -> contextlib.AbstractContextManager[object]:
        """On the stream of the copies, where there is one."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def release(self, buffer: Tensor) -> None:
        """Take a buffer back; the stream's order keeps its next content behind copies already asked for."""
        self._free[buffer.shape, buffer.dtype].append(buffer)


class Parked:
    """A tensor in host memory, to be fetched once."""

    def __init__(self, host: HostMemory, buffer: Tensor, before: "Parked | None") -> None:
        self._host, self._before = host, before
        self._buffer: Tensor | None = buffer
        self._x: Tensor | None = None

    def fetch(self) -> Tensor:
        """The tensor on the device; the one parked before it is sent after it."""
        self._start()
        x, self._x = self._x, None
        assert x is not None, "a parked tensor is fetched once"
        if self._host.stream is not None:
            current = torch.cuda.current_stream(self._host.device)
            current.wait_event(self._arrived)
            x.record_stream(current)
        before, self._before = self._before, None
        if before is not None:
            before._start()
        return x

    def _start(self) -> None:
        if self._buffer is None:
            return
        with self._host.aside():
            self._x = torch.empty_like(self._buffer, device=self._host.device, pin_memory=False)
            self._x.copy_(self._buffer, non_blocking=True)
        if self._host.stream is not None:
            self._arrived = self._host.stream.record_event()
        self._host.release(self._buffer)
        self._buffer = None
