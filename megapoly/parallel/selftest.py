"""What can be known of a host before a long run: does it compute, send, store and read back the same bits, how fast.

Every rank runs every check and writes what it found into the launcher's store; the main rank prints a line for each.
"""

import contextlib
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megapoly.parallel.collectives import all_gather, all_reduce_
from megapoly.parallel.mesh import Mesh, launcher_store
from megapoly.parallel.replicas import hash_bits

REPEATS = 20
CLOCK_SECONDS = 2.0  # by which hosts may differ: file times decide which checkpoint is the newest for a person
SLOW = 0.8  # of the median speed of all GPUs
WAIT = timedelta(minutes=5)


@dataclass(frozen=True)
class Finding:
    """What a rank found in a check: a number that says how good, and what is wrong, if anything."""

    value: float
    unit: str
    problem: str = ""


Check = Callable[[Mesh, Path, int], Finding]


def synchronize(mesh: Mesh) -> None:
    """Wait for the device."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


def check_gemm(mesh: Mesh, _: Path, __: int) -> Finding:
    """The same product again and again has the same bits, on all ranks with the same kind of device; and is right."""
    is_on_gpu = mesh.device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if is_on_gpu else (512, torch.float32)
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(i)).to(mesh.device, dtype) for i in (1, 2))
    first = a @ b
    expected = a[:64].double() @ b.double()
    error = float((first[:64].double() - expected).abs().max() / expected.abs().max())
    synchronize(mesh)
    begin = time.perf_counter()
    products = [a @ b for _ in range(REPEATS)]
    synchronize(mesh)
    tflops = REPEATS * 2 * n**3 / (time.perf_counter() - begin) / 1e12
    differing = sum(int(hash_bits(product) != hash_bits(first)) for product in products)
    name = torch.cuda.get_device_name(mesh.device) if is_on_gpu else "CPU"
    kind = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)
    pairs = all_gather(torch.tensor([[kind, int(hash_bits(first))]], device=mesh.device), mesh.world).tolist()
    alike = [bits for other, bits in pairs if other == kind]
    usual = max(alike, key=alike.count)
    if differing:
        return Finding(tflops, "TFLOP/s", f"{differing} of {REPEATS} equal products differ in their bits")
    if is_on_gpu and int(hash_bits(first)) != usual:
        return Finding(tflops, "TFLOP/s", f"the product differs from that of most {name}")
    return Finding(tflops, "TFLOP/s", f"relative error {error:.1e}" if not error < 1e-2 else "")


def check_all_reduce(mesh: Mesh, _: Path, megabytes: int) -> Finding:
    """A sum of whole numbers is exact; its speed is the bus's, 2 (n - 1) / n of the bytes a second."""
    size = mesh.world.size
    if size == 1:
        return Finding(0.0, "GB/s (one rank: nothing to send)")
    numbers = torch.arange(megabytes * 2**18, device=mesh.device) % 251
    expected = (size * numbers + size * (size - 1) // 2).float()
    wrong, seconds = 0, []
    for _repeat in range(5):
        x = (numbers + mesh.world.rank).float()
        synchronize(mesh)
        begin = time.perf_counter()
        all_reduce_(x, mesh.world)
        synchronize(mesh)
        seconds.append(time.perf_counter() - begin)
        wrong += int((x != expected).sum())
    speed = 2 * (size - 1) / size * expected.nbytes / min(seconds) / 1e9
    return Finding(speed, "GB/s", f"{wrong:,} sums are wrong" if wrong else "")


def check_disk(mesh: Mesh, folder: Path, megabytes: int) -> Finding:
    """What is written, brought to the disk and read back past the cache has the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".selftest-{mesh.world.rank:05d}"
    written = os.urandom(2**20) * megabytes
    try:
        begin = time.perf_counter()
        with path.open("wb") as file:
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        speed = len(written) / (time.perf_counter() - begin) / 1e9
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            same = file.read() == written
    finally:
        path.unlink(missing_ok=True)
    return Finding(speed, "GB/s written", "" if same else f"{path} reads back with other bytes")


def check_clock(mesh: Mesh, _: Path, __: int) -> Finding:
    """The hosts' clocks agree."""
    all_reduce_(torch.zeros(1, device=mesh.device), mesh.world)
    synchronize(mesh)
    times = all_gather(torch.tensor([time.time()], dtype=torch.float64, device=mesh.device), mesh.world)
    off = float((times[mesh.world.rank] - times.median()).abs())
    return Finding(off, "s off the median clock", f"more than {CLOCK_SECONDS:g} s" if off > CLOCK_SECONDS else "")


def check_space(_: Mesh, folder: Path, megabytes: int) -> Finding:
    """The disk has room for a hundred such files as the check of the disk writes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    return Finding(free / 1e9, f"GB free in {folder}", "too little" if free < 100 * megabytes * 2**20 else "")


def host_memory(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Bytes of the host's memory that a program can have, the page cache included, and of all of it."""
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024, int(lines["MemTotal"].split()[0]) * 1024
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def check_memory(mesh: Mesh, _: Path, __: int) -> Finding:
    """Nobody else holds the device's memory; without a GPU, the host has some left."""
    if mesh.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(mesh.device)
    else:
        free, total = host_memory()
    least = total * 0.9 if mesh.device.type == "cuda" else 2**28
    problem = f"of {total / 1e9:.3g} GB: another process holds the rest" if free < least else ""
    return Finding(
        free / 1e9, "GB of device memory free" if mesh.device.type == "cuda" else "GB of memory free", problem
    )


CHECKS: dict[str, Check] = {
    "clock": check_clock,
    "memory": check_memory,
    "space": check_space,
    "disk": check_disk,
    "GEMM": check_gemm,
    "all-reduce": check_all_reduce,
}


def verdict(name: str, findings: list[Finding], is_on_gpu: bool) -> tuple[bool, str]:
    """Whether a check went well on all ranks, and a line about it."""
    problems = [f"rank {rank}: {finding.problem}" for rank, finding in enumerate(findings) if finding.problem]
    values = [finding.value for finding in findings]
    slow = SLOW * statistics.median(values)
    if name == "GEMM" and is_on_gpu:
        problems += [f"rank {rank}: slow ({value:.3g})" for rank, value in enumerate(values) if value < slow]
    span = f"{min(values):.3g}" if len(values) == 1 else f"{min(values):.3g} to {max(values):.3g}"
    line = f"{'FAIL' if problems else 'ok':<5} {name}: {span} {findings[0].unit}"
    return not problems, "; ".join([line, *problems])


def selftest(mesh: Mesh, folder: Path, megabytes: int) -> bool:
    """Run all checks on all ranks, files of so many MB in `folder`; prints a line each; whether all went well."""
    store = launcher_store(mesh) if mesh.world.size > 1 else None
    is_good = True
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for name, check in CHECKS.items():
        try:
            mine = check(mesh, folder, megabytes)
        except (OSError, RuntimeError) as error:
            mine = Finding(0.0, "", " ".join(str(error).split()) or type(error).__name__)
        findings = [mine]
        if store is not None:
            store.set(f"selftest/{name}/{mesh.world.rank}", json.dumps(asdict(mine)))
            keys = [f"selftest/{name}/{rank}" for rank in range(mesh.world.size)]
            store.wait(keys, WAIT)
            findings = [Finding(**json.loads(store.get(key))) for key in keys]
        was_good, line = verdict(name, findings, mesh.device.type == "cuda")
        is_good &= was_good
        if mesh.is_main:
            print(line, flush=True)
    for path in missing:  # that the checks have made; all ranks are past those
        with contextlib.suppress(OSError):  # a rank of this host was faster, or somebody uses it now
            path.rmdir()
    return is_good
