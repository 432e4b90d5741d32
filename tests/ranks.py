"""Running a function on several gloo ranks of this host, and putting their parts together again."""

import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.checkpoint.state import Piece
from megapoly.parallel.mesh import Layout, make_mesh, single_process_mesh

RESULT_SECONDS = 180


def _rank(fn: Callable[..., Any], args: tuple, rank: int, layout: Layout, world: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world, store=dist.FileStore(store, world), timeout=timedelta(seconds=120)
        )
        value = fn(make_mesh(layout, torch.device("cpu")), *args)
        dist.barrier()
        dist.destroy_process_group()
        # Plain bytes: a queue would hand tensors over by shared memory, which ends with this process.
        content = io.BytesIO()
        torch.save(value, content)
        results.put((rank, None, content.getvalue()))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def run_ranks(
    fn: Callable[..., Any], *args: Any, tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1, instances: int = 1,
    shares_vocab: bool = False, kv: int = 1,
) -> list[Any]:  # fmt: skip
    """Call fn(mesh, *args) on tp x cp x pp x dp forked gloo ranks; returns what each returned, by rank.

    A rank that fails ends all others, and its traceback is raised here. World size 1 runs in this process.
    """
    layout = Layout(tp, cp, pp, instances, shares_vocab, kv)
    world = layout.model * dp
    if world == 1:
        return [fn(single_process_mesh(), *args)]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    values: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            context.Process(target=_rank, args=(fn, args, rank, layout, world, store, results)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            for _ in ranks:
                rank, failure, value = results.get(timeout=RESULT_SECONDS)
                if failure is not None:
                    raise AssertionError(f"rank {rank} of {layout} x dp {dp} failed:\n{failure}")
                values[rank] = torch.load(io.BytesIO(value), weights_only=True)
        finally:
            for process in ranks:
                process.join(timeout=0 if len(values) < world else 30)
                if process.is_alive():
                    process.kill()
    return [values[rank] for rank in range(world)]


def assemble(pieces: list[Piece]) -> dict[str, Tensor]:
    """Whole tensors of the pieces of all ranks, on every rank; each entry must come exactly once."""
    mine = [(p.name, p.shape, p.offsets, p.tensor.detach().clone()) for p in pieces]
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    whole: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for name, shape, offsets, tensor in (piece for rank in everyone for piece in rank):
        place = tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape, strict=True))
        whole.setdefault(name, torch.full(shape, torch.nan))[place] = tensor
        times.setdefault(name, torch.zeros(shape))[place] += 1
    for name, count in times.items():
        assert (count == 1).all(), f"{name}: entries come {count.min()} to {count.max()} times"
    return whole
