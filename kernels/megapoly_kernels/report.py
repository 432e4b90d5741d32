"""Compile the shipped launches for A100 and H100 without a GPU: python -m megapoly_kernels.report

The launchers run as they are, on CPU tensors, with Triton's driver replaced by one that names an architecture; every
kernel is compiled with the types, alignments and constants it would have on the GPU, and none is run. From each binary
the tools that come with triton read registers, spills, shared memory and tensor-core instructions.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megapoly_kernels.shipped import CASES, Case

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use
OPCODES = ("HMMA", "HGMMA", "LDGSTS", "UTMALDG", "UTMAREDG")  # tensor cores; cp.async; TMA loads; TMA reductions


class _Driver:
    """What the JIT asks of a driver, for an architecture that is not here."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the JIT caches by device: one number an architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def set_current_device(self, device: int) -> None:
        pass


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Any]]:
    """Inside, launches on CPU tensors compile for `arch` (80 or 90) and do not run; yields the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_it(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if not any(kernel is known for known in compiled):
            compiled.append(kernel)
        return kernel

    driver.set_active(_Driver(arch))
    JITFunction.run = compile_it
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None  # reset_active would look for a GPU at once


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: bytes for `shared` and `spill` (local memory and stack a thread).

    `serial` counts the HGMMA after which the assembler put a wait: a few end a loop, all of them mean no overlap.
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    spill: int
    shared: int
    instructions: dict[str, int]
    serial: int


def resources(kernel: Any, arch: int) -> Resources:
    """Read a compiled kernel's needs from its binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", cubin.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    counts = {code: len(re.findall(rf"\b{code}\b", sass)) for code in OPCODES}
    serial = len(re.findall(r"\bHGMMA\b[^;]*\bgsb0\b", sass))
    name, warps, shared = kernel.metadata.name, kernel.metadata.num_warps, kernel.metadata.shared
    return Resources(name, arch, warps, registers, stack + local, shared, counts, serial)


def compile_case(case: Case, arch: int) -> list[Resources]:
    """Resources of every kernel that a shipped case launches."""
    with compile_only(arch) as kernels:
        case.launch()
    return [resources(kernel, arch) for kernel in kernels]


def main() -> int:
    """Print the table; 1 where a kernel spills more than its case allows or wants too much shared memory."""
    parser = argparse.ArgumentParser(description="Registers, spills, shared memory, tensor-core instructions.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=[80, 90])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    print(f"triton {triton.__version__}, torch {torch.__version__}; spill: bytes a thread, shared: bytes a block")
    print(
        f"{'case':<52}{'kernel':<36}{'arch':>5}{'warps':>6}{'regs':>6}{'spill':>6}{'shared':>9}  "
        + " ".join(OPCODES)
        + " serial"
    )
    is_over = False
    for case in CASES:
        for arch in options.arch if options.only in case.name else ():
            for r in compile_case(case, arch):
                limit = case.spills.get((r.kernel, arch), 0)
                mark = ""
                if r.spill > limit or r.shared > SHARED_LIMIT[arch]:
                    is_over, mark = True, "  OVER"
                counts = " ".join(f"{r.instructions[code]:>{len(code)}}" for code in OPCODES)
                print(
                    f"{case.name:<52}{r.kernel:<36}{r.arch:>5}{r.warps:>6}{r.registers:>6}{r.spill:>6}{r.shared:>9}  "
                    f"{counts} {r.serial:>6}{mark}",
                    flush=True,
                )
    return int(is_over)


if __name__ == "__main__":
    sys.exit(main())
