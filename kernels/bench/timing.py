"""Where things are timed and how.

Times are medians of CUDA events around batches of calls. Before each batch the GPU is kept busy for as long as the host
needs to queue it, so that the kernels are timed and not the host that launches them. CUDA graphs would do that too, but
a capture that fails can leave the process unable to go on.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

BATCH_MS, BATCH_CALLS = 3.0, 20  # a batch is at least so long, if so many calls are enough for it
PROBE_MS = 10.0


@dataclass(frozen=True)
class Machine:
    """Where rows are measured; the two rates are measured in the same process as the rows."""

    device: torch.device
    smoke: bool
    gpu: str
    l2_bytes: int = 0
    copy_tb_per_s: float = 0.0
    gemm_tflop_per_s: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return torch.bfloat16

    @property
    def backends(self) -> tuple[str, ...]:
        """Which of megapoly's implementations of an operation can run here, kernels first."""
        return ("torch",) if self.smoke else ("triton", "torch")

    def random(self, *shape: int, seed: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers, the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return x.normal_(0.0, scale, generator=generator)

    def integers(self, count: int, below: int, seed: int) -> Tensor:
        """int64 labels in [0, below)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(0, below, (count,), generator=generator, device=self.device)


def time_calls(calls: Sequence[Callable[[], Any]], machine: Machine) -> tuple[float, str]:
    """Median milliseconds of a call and the timer; calls come in turn, so that inputs rotate through memory.

    The timer is `events`, `waits` where a call waits for the GPU itself, which no queue hides, or `cpu`. Results stay
    alive until their call comes again, so that outputs rotate as well.
    """
    if machine.device.type == "cpu":
        return _time_on_cpu(calls), "cpu"
    kept: list[Any] = [None] * len(calls)
    turn = itertools.count()

    def batch(count: int) -> None:
        for i in itertools.islice(turn, count):
            at = i % len(calls)
            if len(calls) == 1:
                kept[at] = None  # beyond the cache by itself, and perhaps too large to be held twice
            kept[at] = calls[at]()

    batch(max(3, len(calls)))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    batch(2)
    torch.cuda.synchronize()
    about = max(500 * (time.perf_counter() - begin), 1e-3)  # milliseconds of a call, the host included
    count = max(1, min(BATCH_CALLS, math.ceil(BATCH_MS / about)))
    lead = _host_milliseconds(partial(batch, count))
    if lead >= 0.8 * PROBE_MS:  # once more: it may have waited for memory
        lead = _host_milliseconds(partial(batch, count))
    is_hidden = lead < 0.8 * PROBE_MS
    marks = []
    for _ in range(max(3, min(15, int(150 / (count * about))))):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if is_hidden:
            _keep_busy(2 * lead + 0.2)
        start.record()
        batch(count)
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    milliseconds = statistics.median(start.elapsed_time(end) for start, end in marks) / count
    return milliseconds, "events" if is_hidden else "waits"


def _keep_busy(milliseconds: float) -> None:
    """Queue a kernel that does nothing for so long at 2 GHz, the highest clock there is; at lower ones longer."""
    torch.cuda._sleep(int(2e6 * milliseconds))


def _host_milliseconds(batch: Callable[[], None]) -> float:
    """How long the host takes to queue a batch while the GPU is busy; PROBE_MS or more where it waits for the GPU."""
    _keep_busy(PROBE_MS)
    begin = time.perf_counter()
    batch()
    taken = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    return taken


def _time_on_cpu(calls: Sequence[Callable[[], Any]]) -> float:
    seconds = []
    for i in range(3):
        begin = time.perf_counter()
        calls[i % len(calls)]()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds)


def measured_copy(machine: Machine) -> float:
    """TB/s of a large copy on the device, bytes read and written."""
    count = 1 << 20 if machine.smoke else 1 << 31
    source = torch.empty(count, dtype=torch.uint8, device=machine.device).random_()
    target = torch.empty_like(source)
    milliseconds, _ = time_calls([partial(target.copy_, source)], machine)
    return 2 * count / milliseconds / 1e9


def measured_gemm(machine: Machine) -> float:
    """TFLOP/s of a bf16 product of two square matrices of 8192."""
    n = 64 if machine.smoke else 8192
    a, b = (machine.random(n, n, seed=seed) for seed in (1, 2))
    milliseconds, _ = time_calls([partial(torch.mm, a, b)], machine)
    return 2 * n**3 / milliseconds / 1e9


def this_machine(smoke: bool) -> Machine:
    """The GPU with its measured rates, or the CPU for a smoke run."""
    if smoke:
        machine = Machine(torch.device("cpu"), True, "")
    else:
        properties = torch.cuda.get_device_properties(0)
        l2 = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        machine = Machine(torch.device("cuda", 0), False, torch.cuda.get_device_name(0), l2)
    return replace(machine, copy_tb_per_s=measured_copy(machine), gemm_tflop_per_s=measured_gemm(machine))
