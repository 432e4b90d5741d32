"""Which ranks are slow. A step takes as long on all of them, since each waits for the slowest: so what is compared is
what a rank does alone, which is to load its batches and to multiply the same two small matrices at every report.
"""

import socket
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from megapoly.parallel.collectives import all_gather
from megapoly.parallel.mesh import Mesh

REPORTS = 5  # in a row until it is said: a host that is busy for a moment is none


@dataclass
class Judge:
    """Names a rank, once, that took `factor` times the median and `least` seconds more in so many reports in a row.

    It is named again after a report in which it did not.
    """

    what: str
    hosts: list[str]
    factor: float
    least: float = 0.0
    slow_for: dict[int, int] = field(default_factory=dict)

    def add(self, seconds_by_rank: list[float]) -> list[str]:
        """What there is to say after another report."""
        median = statistics.median_low(seconds_by_rank)
        lines = []
        for rank, seconds in enumerate(seconds_by_rank):
            is_slow = seconds > max(self.factor * median, median + self.least)
            self.slow_for[rank] = self.slow_for.get(rank, 0) + 1 if is_slow else 0
            if self.slow_for[rank] == REPORTS:
                lines.append(
                    f"rank {rank} ({self.hosts[rank]}) is slow in {self.what}: {1000 * seconds:.3g} ms where the "
                    f"median is {1000 * median:.3g} ms, the {REPORTS}th report in a row"
                )
        return lines


class Stragglers:
    """Measures this rank, and compares all of them; every method is called by all ranks together."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        is_on_gpu = mesh.device.type == "cuda"
        self.repeats, n = (32, 2048) if is_on_gpu else (2, 128)
        self.matrix = torch.ones(n, n, dtype=torch.bfloat16 if is_on_gpu else torch.float32, device=mesh.device)
        self.product = torch.empty_like(self.matrix)
        name = socket.gethostname().encode()[:64].ljust(64, b"\0")
        rows = all_gather(torch.tensor([list(name)], device=mesh.device), mesh.world).tolist()
        hosts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
        self.judges = [
            Judge("computing", hosts, factor=1.2 if is_on_gpu else 1.5),
            Judge("loading batches", hosts, factor=1.5, least=0.01),
        ]

    def probe(self) -> float:
        """Seconds that the device takes for the same work each time; the best of three."""
        return min(self._multiply() for _ in range(3))

    def _multiply(self) -> float:
        begin = time.perf_counter()
        for _ in range(self.repeats):
            torch.mm(self.matrix, self.matrix, out=self.product)
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        return time.perf_counter() - begin

    @torch.no_grad()
    def compare(self, loading: float) -> tuple[dict[str, Any], list[str]]:
        """Entries of a row, and warnings, from this rank's seconds a step of loading; waits for the device."""
        mine = torch.tensor([[self.probe(), loading]], dtype=torch.float64, device=self.mesh.device)
        seconds_RK = all_gather(mine, self.mesh.world).cpu()
        entries: dict[str, Any] = {}
        lines = []
        for key, judge, seconds_R in zip(("probe", "loading"), self.judges, seconds_RK.T.tolist(), strict=True):
            slowest = max(range(len(seconds_R)), key=seconds_R.__getitem__)
            entries |= {
                f"{key}_seconds_median": statistics.median_low(seconds_R),
                f"{key}_seconds_max": seconds_R[slowest],
                f"{key}_slowest_rank": slowest,
            }
            lines += judge.add(seconds_R)
        return entries, lines
