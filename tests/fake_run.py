"""The real training step as one rank of thousands: fake process groups, tensors without storage (meta), no data.

Everything runs as on a GPU with the fused kernels, but that no entry is computed and no byte sent. What is replaced:
initial weights (nothing is drawn), the loader (all batches are alike), the launches of attention under context
parallel (which are no torch operations), and the groups of other ranks (not made).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megapoly_kernels import Backends
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megapoly.data.batch import Batch
from megapoly.model.offload import HostMemory
from megapoly.optim.loss_scale import LossScaler
from megapoly.parallel.mesh import Layout, Mesh, make_mesh
from megapoly.plan.communication import Calls
from megapoly.sections import Config, PrecisionConfig
from megapoly.train import setup, step
from megapoly.train.prepare import Prepared
from megapoly.train.setup import Run

META = torch.device("meta")
KERNELS = Backends("triton", "triton", "triton", "fused_linear", "triton", "none runs")
KINDS = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast", "gather_": "gather", "scatter_": "scatter", "send": "send", "recv_": "recv",
}  # fmt: skip


CONTEXT_ATTENTION = sys.modules["megapoly_kernels.context_attention"]  # the package's own name for it is a function


class _Loader:
    def __init__(self, cfg: Config, dp: int) -> None:
        shape = (cfg.train.micro_batch_size, cfg.model.seq_length)
        tokens = np.zeros(shape, dtype=np.int64)
        batch = Batch(tokens, tokens, np.ones(shape, dtype=np.float32), tokens[:, 0])
        self.batches = [batch] * (cfg.train.global_batch_size // (cfg.train.micro_batch_size * dp))

    def batch(self, first: int, end: int) -> list[Batch]:
        return self.batches


class _Plan:
    def __init__(self, block_length: int) -> None:
        self.block_length = block_length
        self.stages = ()


class _Parked:
    def __init__(self, x: Tensor) -> None:
        self.fetch = lambda: torch.empty_like(x)


def _loss(precision: PrecisionConfig) -> str:
    return KERNELS.loss if precision.loss_backend == "auto" else precision.loss_backend


def _empty(array: Any, device: torch.device) -> Tensor:
    return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)


def _attention_forward(qkv_tF: Tensor, kv_TF: Tensor, shape: Any, *_: Any) -> tuple[Tensor, Tensor]:
    return CONTEXT_ATTENTION.empty_outputs(qkv_tF, shape.groups * shape.queries, shape.head_dim)


@contextmanager
def fake_run(cfg: Config, vocab_size: int, world: int, rank: int) -> Iterator[Run]:
    """The run of one rank, ready to step, on a mesh that ends with the context."""
    dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=world, store=FakeStore())
    new_group, dp = dist.new_group, world // Layout.of(cfg).model
    plan: Any = _Plan(cfg.model.seq_length)
    prepared = Prepared(cfg, None, vocab_size, [None] * len(cfg.data.sources), [None], plan, 2**40)  # type: ignore
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (dist, "new_group", lambda ranks, **options: new_group(ranks, **options) if rank in ranks else None),
        (setup, "choose_backends", lambda precision, _: replace(KERNELS, loss=_loss(precision))),
        (sys.modules["megapoly_kernels.rotary"], "resolve_backend", lambda backend, _: backend or "triton"),
        (HostMemory, "park", lambda _, x: _Parked(x)),
        (setup, "initialize", lambda *_: None),
        (setup, "TrainLoader", lambda *_: _Loader(cfg, dp)),
        (setup, "ValidLoader", lambda *_: None),
        (step, "to_device", _empty),
        (LossScaler, "accepts", lambda *_: True),
        (CONTEXT_ATTENTION, "launch_forward", _attention_forward),
        (CONTEXT_ATTENTION, "launch_delta", lambda out_thK, d_out_thK, lse_ht: torch.empty_like(lse_ht)),
        (CONTEXT_ATTENTION, "launch_keys", lambda d_out_tF, qkv_tF, kv_TF, *_: torch.empty_like(kv_TF)),
        (CONTEXT_ATTENTION, "launch_queries_", lambda *_: None),
    ]
    try:
        with ExitStack() as stack:
            for target, name, value in replaced:
                stack.enter_context(patch.object(target, name, value))
            run = setup.build_run(prepared, make_mesh(Layout.of(cfg), META))
            run.optimizer.muon.dtype = torch.bfloat16  # as on a GPU
            yield run
    finally:
        dist.destroy_process_group()


def name_groups(mesh: Mesh) -> dict[dist.ProcessGroup, str]:
    """A name for every group of a rank: its first axis's. Axes of the same ranks share a group."""
    names: dict[dist.ProcessGroup, str] = {}
    for axis in mesh.axes:
        if axis.group is not None:
            names.setdefault(axis.group, axis.name)
    return names


class Collectives(TorchDispatchMode):
    """Counts every collective that reaches c10d while open: `traffic` by (name of the group, kind)."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.names = name_groups(mesh)
        self.traffic: dict[tuple[str, str], Calls] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]
            group = next(
                arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            )
            key = self.names[dist.ProcessGroup.unbox(group)], KINDS[func._opname]
            number, before = self.traffic.get(key, Calls())
            self.traffic[key] = Calls(number + 1, before + max(x.nbytes for x in tensors))
        return func(*args, **(kwargs or {}))


class Kept:
    """Bytes that graphs keep for backward while open, each storage once; `most` is their peak.

    What lies in one of the `static` tensors (parameters, tables) is not counted.
    """

    def __init__(self, static: list[Tensor]) -> None:
        self.static = {x.untyped_storage()._cdata for x in static}
        self.uses: dict[int, int] = {}
        self.now = self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: _Saved(self, x), lambda saved: saved.x)

    def __enter__(self) -> "Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


class _Saved:
    """A saved tensor; it goes when the graph lets go of it."""

    def __init__(self, kept: Kept, x: Tensor) -> None:
        self.kept, self.x, storage = kept, x, x.untyped_storage()
        self.key, self.bytes = storage._cdata, storage.nbytes()
        if self.key not in kept.static:
            kept.uses[self.key] = kept.uses.get(self.key, 0) + 1
            if kept.uses[self.key] == 1:
                kept.now += self.bytes
                kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        if self.key not in self.kept.static:
            self.kept.uses[self.key] -= 1
            if not self.kept.uses[self.key]:
                self.kept.now -= self.bytes
