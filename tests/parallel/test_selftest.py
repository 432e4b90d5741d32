"""The self-test of hosts: it passes where all is well, and any wrong bit, sum, byte or clock fails it by name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from megapoly.parallel import selftest
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.parallel.selftest import CHECKS, Finding, verdict

HERE = Path(__file__).parents[2]


def findings(mesh: Mesh, folder: Path) -> list[str]:
    return [check(mesh, folder, 1).problem for check in CHECKS.values()]


def test_two_sound_ranks_find_nothing(tmp_path: Path) -> None:
    assert run_ranks(findings, tmp_path, dp=2) == [[""] * len(CHECKS)] * 2
    assert not list(tmp_path.iterdir())


def test_the_page_cache_is_nobodys_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemFree: 7 kB\nMemAvailable: 3000 kB\nHugePages_Total: 0\n")
    assert selftest.host_memory(meminfo) == (3000 * 1024, 4000 * 1024)
    elsewhere, here = selftest.host_memory(tmp_path / "none"), selftest.host_memory()
    assert elsewhere[1] == here[1] and 0 < elsewhere[0] < here[1]


def wrong_sum(mesh: Mesh, folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        real = selftest.all_reduce_

        def reduce(x: torch.Tensor, *rest: object) -> torch.Tensor:
            real(x, *rest)
            x[7] += mesh.world.rank
            return x

        patch.setattr(selftest, "all_reduce_", reduce)
        return CHECKS["all-reduce"](mesh, folder, 1).problem


def test_a_wrong_sum_is_found_where_it_is(tmp_path: Path) -> None:
    assert run_ranks(wrong_sum, tmp_path, dp=2) == ["", "5 sums are wrong"]


def test_a_product_that_is_not_repeatable_or_wrong_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, count = torch.Tensor.__matmul__, 0

    def flipping(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        product = real(a, b)
        if count == 9:
            product[3, 4] = torch.nextafter(product[3, 4], torch.tensor(torch.inf))
        return product

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", flipping)
        assert "1 of 20 equal products differ" in CHECKS["GEMM"](single_process_mesh(), tmp_path, 1).problem

    def half(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return real(a, b) * (0.9 if a.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", half)
    assert "relative error" in CHECKS["GEMM"](single_process_mesh(), tmp_path, 1).problem


def test_a_disk_that_reads_back_other_bytes_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def damage(number: int) -> None:
        os.pwrite(number, b"\0\0\0\0\0\0\0\0", 4242)

    monkeypatch.setattr(os, "fsync", damage)
    assert "reads back with other bytes" in CHECKS["disk"](single_process_mesh(), tmp_path, 1).problem
    assert not list(tmp_path.iterdir())


def off_clock(mesh: Mesh, folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        real: Callable[[], float] = selftest.time.time
        patch.setattr(selftest.time, "time", lambda: real() + 60 * (mesh.world.rank == 2))
        return CHECKS["clock"](mesh, folder, 1).problem


def test_the_rank_whose_clock_is_off_is_named(tmp_path: Path) -> None:
    assert run_ranks(off_clock, tmp_path, dp=3) == ["", "", "more than 2 s"]


def test_a_full_disk_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selftest.shutil, "disk_usage", lambda _: type("", (), {"free": 99 * 2**20})())
    assert CHECKS["space"](single_process_mesh(), tmp_path, 1).problem == "too little"


def test_a_line_names_every_rank_that_fails_and_a_slow_gpu() -> None:
    assert verdict("GEMM", [Finding(600.0, "TFLOP/s"), Finding(610.0, "TFLOP/s")], True) == (
        True, "ok    GEMM: 600 to 610 TFLOP/s",
    )  # fmt: skip
    speeds = [Finding(600.0, "TFLOP/s"), Finding(400.0, "TFLOP/s"), Finding(601.0, "TFLOP/s")]
    assert verdict("GEMM", speeds, True) == (False, "FAIL  GEMM: 400 to 601 TFLOP/s; rank 1: slow (400)")
    assert verdict("GEMM", speeds, False)[0]
    assert verdict("disk", [Finding(1.0, "GB/s", "a"), Finding(1.0, "GB/s", "b")], True) == (
        False, "FAIL  disk: 1 to 1 GB/s; rank 0: a; rank 1: b",
    )  # fmt: skip


def test_the_tool_prints_a_line_a_check_and_ends_with_1_where_one_fails(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "tools/selftest.py"), "--megabytes", "1", "--distributed-backend", "gloo"]
    good = subprocess.run(
        [*command, "--folder", str(tmp_path / "here/deeper")], capture_output=True, text=True, check=False
    )
    assert good.returncode == 0, good.stderr
    assert [line.split()[1] for line in good.stdout.splitlines()] == [f"{name}:" for name in CHECKS]
    assert not list(tmp_path.iterdir())  # neither files nor the folders made for them
    (tmp_path / "file").touch()
    bad = subprocess.run([*command, "--folder", str(tmp_path / "file")], capture_output=True, text=True, check=False)
    failed = [line for line in bad.stdout.splitlines() if line.startswith("FAIL")]
    assert bad.returncode == 1 and len(failed) == 2 and "Traceback" not in bad.stderr, json.dumps(bad.stderr)
