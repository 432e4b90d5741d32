"""Where things are timed and how.

Times are medians of CUDA-event timings after warm-up. Calls below 300 us are captured in a CUDA graph and timed as its
replays, so that the kernels are timed and not the host that launches them.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

GRAPH_BELOW_MS = 0.3


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


def time_calls(calls: Sequence[Callable[[], Any]], machine: Machine, is_capturable: bool = True) -> tuple[float, str]:
    """Median milliseconds of a call and the timer (`events`, `graph`, or `cpu`); calls come in turn.

    Results stay alive until their call comes again, so that outputs rotate through memory as inputs do.
    """
    kept: list[Any] = [None] * len(calls)
    if machine.device.type == "cpu":
        return _time_on_cpu(calls), "cpu"
    for i in range(max(3, len(calls))):
        if len(calls) == 1:
            kept[0] = None  # beyond the cache by itself, and perhaps too large to be held twice
        kept[i % len(calls)] = calls[i % len(calls)]()
    kept[0] = None
    torch.cuda.synchronize()
    begin = time.perf_counter()
    kept[0] = calls[0]()
    torch.cuda.synchronize()
    repetitions = min(100, max(7, int(0.2 / max(time.perf_counter() - begin, 1e-6))))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for i, (start, end) in enumerate(marks):
        if len(calls) == 1:
            kept[0] = None
        start.record()
        kept[i % len(calls)] = calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    milliseconds = statistics.median(start.elapsed_time(end) for start, end in marks)
    if milliseconds >= GRAPH_BELOW_MS or not is_capturable:
        return milliseconds, "events"
    kept.clear()
    try:
        return _time_graph(calls), "graph"
    except RuntimeError:  # it waits for the GPU, which no capture allows
        torch.cuda.synchronize()
        return milliseconds, "events"


def _time_on_cpu(calls: Sequence[Callable[[], Any]]) -> float:
    seconds = []
    for i in range(3):
        begin = time.perf_counter()
        calls[i % len(calls)]()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds)


def _time_graph(calls: Sequence[Callable[[], Any]]) -> float:
    rounds = math.ceil(20 / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = []
        for _ in range(rounds):
            kept = [call() for call in calls]
    milliseconds = []
    for i in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            milliseconds.append(start.elapsed_time(end))
    del kept
    return statistics.median(milliseconds) / (rounds * len(calls))


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
