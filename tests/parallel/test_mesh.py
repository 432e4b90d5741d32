"""Which ranks stand in which group: Megatron-LM's order, and what every axis is for."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megapoly.parallel.mesh import Axis, Layout, Mesh, _is_python, make_mesh, prepare_host, single_process_mesh
from megapoly.sections import ParallelConfig

WORLD = 32
LAYOUT = Layout(tp=2, cp=2, pp=2, instances=2, shares_vocab=True, kv=2)


@pytest.fixture(params=[0, 5, 18, 31])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    dist.init_process_group("fake", rank=request.param, world_size=WORLD, store=FakeStore())
    yield make_mesh(LAYOUT, torch.device("cpu"))
    dist.destroy_process_group()


def ranks(axis: Axis) -> list[int]:
    return dist.get_process_group_ranks(axis.group)


def test_neighbours_share_matrices_then_sequences_then_optimizer_state(mesh: Mesh) -> None:
    rank = dist.get_rank()
    t, c, d, p = rank % 2, rank // 2 % 2, rank // 4 % 4, rank // 16

    def number(t: int = t, c: int = c, d: int = d, p: int = p) -> int:
        return ((p * 4 + d) * 2 + c) * 2 + t

    assert number() == rank
    assert ranks(mesh.tp) == ranks(mesh.kv) == [number(t=i) for i in range(2)]
    assert ranks(mesh.cp) == [number(c=i) for i in range(2)]
    assert ranks(mesh.dp) == [number(d=i) for i in range(4)]
    assert ranks(mesh.pp) == ranks(mesh.embedding) == [number(p=i) for i in range(2)]
    assert ranks(mesh.replicas) == [number(d=i, c=j) for i in range(4) for j in range(2)]
    assert ranks(mesh.shards) == [number(d=i, c=j) for i in (d // 2 * 2, d // 2 * 2 + 1) for j in range(2)]
    assert ranks(mesh.instances) == [number(d=i) for i in (d % 2, d % 2 + 2)]
    assert ranks(mesh.vocab) == [number(p=i, t=j) for i in range(2) for j in range(2)]


def test_an_axis_knows_this_ranks_place(mesh: Mesh) -> None:
    for axis in mesh.axes:
        assert ranks(axis)[axis.rank] == dist.get_rank(), axis.name
        assert len(ranks(axis)) == axis.size, axis.name
    assert mesh.replicas.size == mesh.shards.size * mesh.instances.size == mesh.dp.size * mesh.cp.size
    assert mesh.replicas.rank == mesh.instances.rank * mesh.shards.size + mesh.shards.rank


def test_axes_of_the_same_ranks_share_a_group() -> None:
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    try:
        mesh = make_mesh(Layout(tp=2), torch.device("cpu"))
        assert mesh.dp.group is mesh.replicas.group is mesh.shards.group
        assert mesh.vocab.group is mesh.tp.group
        assert [axis.name for axis in mesh.axes if axis.size == 1] == ["cp", "pp", "instances", "embedding", "kv"]
    finally:
        dist.destroy_process_group()


def test_tensor_parallel_neighbours_share_a_key_value_head() -> None:
    dist.init_process_group("fake", rank=7, world_size=16, store=FakeStore())
    try:
        mesh = make_mesh(Layout(tp=8, kv=4), torch.device("cpu"))
        assert ranks(mesh.kv) == [4, 5, 6, 7]
        assert (mesh.tp.rank // mesh.kv.size, mesh.kv.rank) == (1, 3)  # the second head's last part of the queries
    finally:
        dist.destroy_process_group()


def test_a_middle_stage_has_no_embedding_partner() -> None:
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    try:
        assert make_mesh(Layout(pp=3), torch.device("cpu")).embedding == Axis("embedding")
    finally:
        dist.destroy_process_group()


def test_one_process_needs_no_group() -> None:
    assert all(axis.size == 1 and axis.group is None for axis in single_process_mesh().axes)
    assert len(single_process_mesh().axes) == 11


@pytest.mark.parametrize(("sizes", "chosen"), [({}, None), ({"tensor_model_parallel_size": 2}, "1")])
def test_kernels_start_in_the_order_of_issue_where_tensor_parallel_needs_it(
    sizes: dict[str, int], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    prepare_host(ParallelConfig(**sizes))
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == chosen
    monkeypatch.setattr(os, "environ", {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "TORCH_NCCL_HIGH_PRIORITY": "0"})
    prepare_host(ParallelConfig(**sizes))
    assert os.environ == {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "TORCH_NCCL_HIGH_PRIORITY": "0"}


@pytest.mark.skipif(_is_python(1), reason="process 1 is Python: orphans cannot be told from children of a launcher")
def test_a_rank_whose_launcher_was_gone_before_it_asked_ends(tmp_path: Path) -> None:
    """The launcher here is a shell that ends at once; then the rank is a child of process 1."""
    code = (
        "import os, pathlib, time\n"
        "from megapoly.parallel.mesh import die_with_launcher\n"
        "while os.getppid() == int(os.environ['LAUNCHER']): time.sleep(0.01)\n"
        "pathlib.Path('came').touch()\n"
        "if os.getppid() != 1: pathlib.Path('adopted').touch()\n"
        "die_with_launcher()\n"
        "pathlib.Path('went on').touch()\n"
    )
    (tmp_path / "rank.py").write_text(code)
    command = f"LAUNCHER=$$ TORCHELASTIC_RUN_ID=x {sys.executable} rank.py >log 2>&1 & echo $!"
    rank = int(
        subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
    )
    deadline = time.monotonic() + 60
    while Path(f"/proc/{rank}").exists() and "Z" not in Path(f"/proc/{rank}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (tmp_path / "came").exists()
    if (tmp_path / "adopted").exists():
        pytest.skip("orphans here become children of another process than 1")
    assert not (tmp_path / "went on").exists()
