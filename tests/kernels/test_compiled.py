"""Every shipped launch compiles for A100 and H100, and fits: registers, shared memory, tensor cores."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from megapoly_kernels.report import SHARED_LIMIT, Resources, compile_case
from megapoly_kernels.shipped import CASES, Case

Compiled = dict[tuple[str, int], "Future[list[Resources]]"]
ATTENTION = [case for case in CASES if "_attention" in case.name and "fp32" not in case.name]


def compile_by_name(name: str, arch: int) -> list[Resources]:
    return compile_case(next(case for case in CASES if case.name == name), arch)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    """Every case and architecture, compiled by two processes of their own, the slowest first."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {
            (case.name, arch): pool.submit(compile_by_name, case.name, arch)
            for case in sorted(CASES, key=lambda case: case not in ATTENTION and "fp32" not in case.name)
            for arch in (80, 90)
        }


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_spills_unrecorded_and_shared_memory_fits(case: Case, arch: int, compiled: Compiled) -> None:
    kernels = compiled[case.name, arch].result()
    assert kernels
    for r in kernels:
        assert r.spill <= case.spills.get((r.kernel, arch), 0), r
        assert r.shared <= SHARED_LIMIT[arch], r
        assert r.registers * r.warps * 32 <= 65536, r


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_multiplies_on_tensor_cores_and_loads_asynchronously(case: Case, compiled: Compiled) -> None:
    is_power_of_two = "80" not in case.name
    for arch in (80, 90):
        loops = [r for r in compiled[case.name, arch].result() if "forward" in r.kernel or "backward" in r.kernel]
        assert len(loops) == 3
        for r in loops:
            i = r.instructions
            if arch == 80:
                assert i["HMMA"] and i["LDGSTS"], r
            else:
                assert i["HGMMA"] and not i["HMMA"] and i["UTMALDG" if is_power_of_two else "LDGSTS"], r
                assert 2 * r.serial <= i["HGMMA"] or not is_power_of_two, r
