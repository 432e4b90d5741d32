"""The process mesh: which rank stands where on the tensor, pipeline and data axes.

Axes are values that are passed to whoever needs them; the environment is read here and nowhere else.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

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


def init_mesh(cfg: ParallelConfig) -> Mesh:
    """Join the process group and split it into axes: tensor ranks are neighbours, then data, then pipeline.

    This is Megatron-LM's order: the axis that talks most stays within a host. Raises ConfigError where the launcher's
    world does not fit the devices.
    """
    if cfg.distributed_backend == "gloo" or not torch.cuda.is_available():
        device = torch.device("cpu")
        if cfg.distributed_backend == "nccl":
            raise ConfigError("distributed_backend nccl needs CUDA devices; this host has none: use gloo")
    else:
        if local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank()} has no GPU of its own (this host has {torch.cuda.device_count()}); "
                "start fewer ranks or use --distributed-backend gloo"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if world_size() == 1:
        return single_process_mesh(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=cfg.distributed_timeout_minutes))
    mesh = make_mesh(cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, device)
    for axis in (mesh.world, mesh.tp, mesh.dp, mesh.pp, mesh.embedding):
        if axis.group is not None:  # NCCL wants all of a group's ranks in its first operation, which a send is not
            dist.all_reduce(torch.zeros(1, device=device), group=axis.group)
    return mesh


def make_mesh(tp: int, pp: int, device: torch.device) -> Mesh:
    """Split the joined process group into axes; dp is what tp x pp leaves of the world."""
    world = dist.get_world_size()
    dp = world // (tp * pp)
    grid = init_device_mesh(device.type, (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
    axes = {}
    for name, size in (("pp", pp), ("dp", dp), ("tp", tp)):
        axes[name] = Axis(name, grid.get_local_rank(name), size, grid.get_group(name) if size > 1 else None)
    everyone = Axis("world", dist.get_rank(), world, dist.group.WORLD)
    return Mesh(device=device, world=everyone, embedding=_embedding_axis(grid.mesh, axes["pp"], everyone), **axes)


def _embedding_axis(ranks: torch.Tensor, pp: Axis, world: Axis) -> Axis:
    """The first and the last stage as an axis of two; a middle stage and a single stage are alone."""
    if pp.size == 1:
        return Axis("embedding")
    if pp.size == 2:
        return Axis("embedding", pp.rank, 2, pp.group)
    mine = Axis("embedding")
    for pair in torch.stack([ranks[0].flatten(), ranks[-1].flatten()], dim=1).tolist():
        group = dist.new_group(pair)  # every rank takes part in making every group
        if world.rank in pair:
            mine = Axis("embedding", pair.index(world.rank), 2, group)
    return mine


def leave(mesh: Mesh) -> None:
    """Leave the process group, after everyone has arrived."""
    if mesh.world.group is not None:
        dist.barrier()
        dist.destroy_process_group()
