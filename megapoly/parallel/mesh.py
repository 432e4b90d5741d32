"""The process mesh: which rank stands where on the tensor, context, data and pipeline axes.

Axes are values that are passed to whoever needs them; the environment is read here and nowhere else.
"""

import ctypes
import dataclasses
import os
import secrets
import signal
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megapoly.errors import FAILURE_STATUS, ConfigError
from megapoly.parallel.joining import join
from megapoly.sections import Config, ParallelConfig

HOST_SETTINGS = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_", "TORCH_NCCL_")


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
class Layout:
    """Sizes of the axes; data parallel takes what tp x cp x pp leaves of the world. `kv` lies within tp."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    instances: int = 1
    shares_vocab: bool = False
    kv: int = 1

    @classmethod
    def of(cls, cfg: Config) -> "Layout":
        """As the configuration says."""
        p = cfg.parallel
        return cls(
            p.tensor_model_parallel_size,
            p.context_parallel_size,
            p.pipeline_model_parallel_size,
            p.num_distributed_optimizer_instances,
            p.shares_head,
            max(p.tensor_model_parallel_size // cfg.model.num_kv_heads, 1),
        )

    @property
    def model(self) -> int:
        """Ranks that train one sequence together."""
        return self.tp * self.cp * self.pp


@dataclass(frozen=True)
class Mesh:
    """All axes of this rank.

    `replicas` is dp x cp: the ranks that hold the same parameters. It is `shards` x `instances`: optimizer state is
    sharded over `shards` and repeated over `instances`. `embedding` joins first and last pipeline rank (tied matrices),
    `vocab` is pp x tp where the head is shared among pipeline ranks, else tp. `kv` joins the tensor-parallel ranks that
    hold the same key/value head, where there are more ranks than heads.
    """

    device: torch.device
    world: Axis
    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    replicas: Axis
    shards: Axis
    instances: Axis
    embedding: Axis
    vocab: Axis
    kv: Axis

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the records of the run."""
        return self.world.rank == 0

    @property
    def axes(self) -> list[Axis]:
        """All axes, in the order in which their groups were made."""
        return [value for value in vars(self).values() if isinstance(value, Axis)]


def single_process_mesh(device: str | torch.device = "cpu") -> Mesh:
    """A mesh of one rank without any process group."""
    names = [field.name for field in dataclasses.fields(Mesh) if field.type is Axis]
    return Mesh(device=torch.device(device), **{name: Axis(name) for name in names})


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


def prepare_host(cfg: ParallelConfig) -> None:
    """Choose, where the user has not, how the host drives its GPUs; CUDA reads it once, when it starts."""
    settings = {"TORCH_NCCL_HIGH_PRIORITY": "1"}  # a collective's few blocks run before those of a matrix product
    if cfg.tensor_model_parallel_size > 1 or cfg.context_parallel_size > 1:
        # One queue: kernels start in the order of issue, a collective before the product that hides it.
        settings["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def describe_host(device: torch.device) -> str:
    """One line on what this host's ranks run with, settings of the user and our own alike."""
    words = [f"{local_world_size()} ranks on {socket.gethostname()}", f"{torch.get_num_threads()} CPU threads a rank"]
    if device.type == "cuda":
        words += [torch.cuda.get_device_name(device), "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))]
        words += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(HOST_SETTINGS)]
    return f"host: {', '.join(words)}"


def launcher_store(mesh: Mesh) -> dist.Store:
    """A connection of its own to the store of the ranks' rendezvous, in a namespace of this start; all ranks call it.

    The namespace is drawn, as torchrun may keep the store when it starts the ranks again, and its count of restarts
    differs between hosts.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    drawn = torch.tensor([secrets.randbits(62) if mesh.is_main else 0], device=mesh.device)
    dist.all_reduce(drawn, group=mesh.world.group)
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"megapoly/{int(drawn):x}", store)


def die_with_launcher() -> None:
    """Have the kernel end this worker when its launcher is gone (Linux): orphans would go on writing to the run."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1 and not _is_python(1):  # it was gone before; in a container it may be process 1 itself
            os._exit(FAILURE_STATUS)


def _is_python(process: int) -> bool:
    try:
        return "python" in os.readlink(f"/proc/{process}/exe")
    except OSError:  # another user's
        return False


def init_mesh(cfg: Config) -> Mesh:
    """Join the process group, split it into axes, and let each talk once before the first step."""
    device = torch.device("cpu")
    if torch.cuda.is_available() and cfg.parallel.distributed_backend != "gloo":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if world_size() == 1:
        return single_process_mesh(device)
    timeout = timedelta(minutes=cfg.parallel.distributed_timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    start = max(timeout, timedelta(minutes=1))  # ranks do not start at once
    join(backend, int(os.environ["RANK"]), world_size(), start)
    mesh = make_mesh(Layout.of(cfg), device, timeout)
    for axis in mesh.axes:
        if axis.group is not None:  # NCCL wants all of a group's ranks in its first operation, which a send is not
            dist.all_reduce(torch.zeros(1, device=device), group=axis.group)
    return mesh


def make_mesh(layout: Layout, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Mesh:
    """Split the joined process group into axes: tensor ranks are neighbours, then context, then data, then pipeline.

    This is Megatron-LM's order: the axis that talks most stays within a host, and a part of the replicas, which shard
    optimizer state among them, is as near as can be. The groups are made one by one because DeviceMesh gives its
    groups a timeout of its own.
    """
    world = dist.get_world_size()
    ranks_PDCT = torch.arange(world).view(layout.pp, world // layout.model, layout.cp, layout.tp)
    replicas_PTR = ranks_PDCT.permute(0, 3, 1, 2).flatten(2)  # R: data, then context
    parts_PTIS = replicas_PTR.unflatten(2, (layout.instances, -1))
    ends_PDCT = ranks_PDCT[[0, -1]] if layout.pp > 1 else ranks_PDCT
    vocab = ranks_PDCT.permute(1, 2, 0, 3).flatten(2) if layout.shares_vocab else ranks_PDCT

    groups: dict[tuple[tuple[int, ...], ...], list[dist.ProcessGroup]] = {}

    def axis(name: str, ranks: torch.Tensor) -> Axis:
        lines = tuple(map(tuple, ranks.flatten(0, -2).tolist()))
        if len(lines[0]) > 1 and lines not in groups:  # every rank takes part in making every group
            groups[lines] = [dist.new_group(line, timeout=timeout, group_desc=name) for line in lines]
        for number, line in enumerate(lines):
            if len(line) > 1 and dist.get_rank() in line:
                return Axis(name, line.index(dist.get_rank()), len(line), groups[lines][number])
        return Axis(name)  # a rank in no line (a middle stage's embedding) is alone

    return Mesh(
        device=device,
        world=Axis("world", dist.get_rank(), world, dist.group.WORLD),
        tp=axis("tp", ranks_PDCT),
        cp=axis("cp", ranks_PDCT.transpose(2, 3)),
        dp=axis("dp", ranks_PDCT.permute(0, 2, 3, 1)),
        pp=axis("pp", ranks_PDCT.permute(1, 2, 3, 0)),
        replicas=axis("replicas", replicas_PTR),
        shards=axis("shards", parts_PTIS),
        instances=axis("instances", parts_PTIS.transpose(2, 3)),
        embedding=axis("embedding", ends_PDCT.permute(1, 2, 3, 0)),
        vocab=axis("vocab", vocab),
        kv=axis("kv", ranks_PDCT.unflatten(3, (-1, layout.kv))),
    )


def leave(mesh: Mesh) -> None:
    """Leave the process group, after everyone has arrived."""
    if mesh.world.group is not None:
        dist.barrier()
        dist.destroy_process_group()
