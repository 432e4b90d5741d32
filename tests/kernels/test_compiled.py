"""Every shipped launch compiles for A100 and H100, and fits: registers, shared memory, tensor cores."""

from functools import cache

import pytest
from megapoly_kernels.report import SHARED_LIMIT, Resources, compile_case
from megapoly_kernels.shipped import CASES, Case

ATTENTION = [case for case in CASES if case.name.startswith("rotary_attention") and "fp32" not in case.name]


@cache
def compiled(name: str, arch: int) -> list[Resources]:
    return compile_case(next(case for case in CASES if case.name == name), arch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_spills_unrecorded_and_shared_memory_fits(case: Case, arch: int) -> None:
    kernels = compiled(case.name, arch)
    assert kernels
    for r in kernels:
        assert r.spill <= case.spills.get((r.kernel, arch), 0), r
        assert r.shared <= SHARED_LIMIT[arch], r
        assert r.registers * r.warps * 32 <= 65536, r


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_multiplies_on_tensor_cores_and_loads_asynchronously(case: Case) -> None:
    is_power_of_two = "80" not in case.name
    for arch in (80, 90):
        loops = [r for r in compiled(case.name, arch) if "forward" in r.kernel or "backward" in r.kernel]
        assert len(loops) == 3
        for r in loops:
            i = r.instructions
            if arch == 80:
                assert i["HMMA"] and i["LDGSTS"], r
            else:
                assert i["HGMMA"] and not i["HMMA"] and i["UTMALDG" if is_power_of_two else "LDGSTS"], r
