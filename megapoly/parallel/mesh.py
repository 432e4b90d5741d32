"""The process mesh: which rank stands where on the tensor, pipeline and data axes.

Axes are values that are passed to whoever needs them; the environment is read here and nowhere else.
"""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megapoly.config import ParallelConfig
from megapoly.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh as this rank sees it; `group` is None where the axis has one rank."""

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Mesh:
    """All axes of this rank. `embedding` joins first and last pipeline stage (tied matrices); `model` is tp x pp."""

    device: torch.device
    world: Axis
    tp: Axis
    pp: Axis
    dp: Axis
    embedding: Axis

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the records of the run."""
        return self.world.rank == 0


def single_process_mesh(device: str | torch.device = "cpu") -> Mesh:
    """A mesh of one rank without any process group."""
    one = {name: Axis(name) for name in ("world", "tp", "pp", "dp", "embedding")}
    return Mesh(device=torch.device(device), **one)


def world_size() -> int:
    """Number of ranks that the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This rank's number on its host (0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks that the launcher started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_devices(cfg: ParallelConfig) -> None:
    """Refuse a backend or a number of ranks that this host has no devices for; every rank of it finds the same."""
    if cfg.distributed_backend == "nccl" and not torch.cuda.is_available():
        raise ConfigError("distributed_backend nccl needs CUDA devices; this host has none: use gloo")
    if torch.cuda.is_available() and cfg.distributed_backend != "gloo":
        gpus = torch.cuda.device_count()
        if local_world_size() > gpus:
            raise ConfigError(
                f"{local_world_size()} ranks on this host, which has {gpus} GPU(s): start one rank a GPU "
                "or use --distributed-backend gloo"
            )


def die_with_launcher() -> None:
    """Have the kernel end this worker when its launcher is gone (Linux): orphans would go on writing to the run."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)


def init_mesh(cfg: ParallelConfig) -> Mesh:
    """Join the process group and split it into axes: tensor ranks are neighbours, then data, then pipeline.

    This is Megatron-LM's order: the axis that talks most stays within a host.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available() and cfg.distributed_backend != "gloo":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if world_size() == 1:
        return single_process_mesh(device)
    timeout = timedelta(minutes=cfg.distributed_timeout_minutes)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    mesh = make_mesh(cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, device, timeout)
    for axis in (mesh.world, mesh.tp, mesh.dp, mesh.pp, mesh.embedding):
        if axis.group is not None:  # NCCL wants all of a group's ranks in its first operation, which a send is not
            dist.all_reduce(torch.zeros(1, device=device), group=axis.group)
    return mesh


def make_mesh(tp: int, pp: int, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Mesh:
    """Split the joined process group into axes; dp is what tp x pp leaves of the world.

    The groups are made one by one because DeviceMesh gives its groups a timeout of its own.
    """
    world = dist.get_world_size()
    ranks_PDT = torch.arange(world).view(pp, world // (tp * pp), tp)
    everyone = Axis("world", dist.get_rank(), world, dist.group.WORLD)
    return Mesh(
        device=device,
        world=everyone,
        tp=_axis("tp", ranks_PDT.flatten(0, 1), timeout),
        pp=_axis("pp", ranks_PDT.flatten(1).T, timeout),
        dp=_axis("dp", ranks_PDT.transpose(1, 2).flatten(0, 1), timeout),
        embedding=_axis("embedding", ranks_PDT[[0, -1]].flatten(1).T if pp > 1 else ranks_PDT.view(-1, 1), timeout),
    )


def _axis(name: str, lines: torch.Tensor, timeout: timedelta) -> Axis:
    """The line of ranks that this rank stands in; a rank in none (a middle stage's embedding) is alone."""
    mine = Axis(name)
    for line in lines.tolist() if lines.shape[1] > 1 else []:
        group = dist.new_group(line, timeout=timeout)  # every rank takes part in making every group
        if dist.get_rank() in line:
            mine = Axis(name, line.index(dist.get_rank()), len(line), group)
    return mine


def leave(mesh: Mesh) -> None:
    """Leave the process group, after everyone has arrived."""
    if mesh.world.group is not None:
        dist.barrier()
        dist.destroy_process_group()
