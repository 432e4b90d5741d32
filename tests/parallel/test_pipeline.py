"""The executor: any schedule gives the gradients of micro-batches taken one after the other, bit for bit, in few buffers."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.pipelining as oracle
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megapoly.parallel.collectives import all_reduce_
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.parallel.pipeline import Pipeline
from megapoly.parallel.schedule import SCHEDULES, placement_for
from megapoly.parallel.weight_gradients import WeightGradients

WIDTH, TOKENS = 24, 5


class QueuedLinear(torch.autograd.Function):
    """x W^T whose weight gradient goes through the queue."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue = weight, queue
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,), weight, grad = ctx.saved_tensors, ctx.weight, grads[0]

        def add() -> None:
            part = (x.t() @ grad).t()
            weight.grad = part if weight.grad is None else weight.grad + part

        ctx.queue.add(add)
        return grad @ weight, None, None


class Part(nn.Module):
    """A global stage: two layers, the last without an activation, so that nothing in it keeps its output."""

    def __init__(self, number: int, queue: WeightGradients | None) -> None:
        super().__init__()
        self.queue = queue
        draw = torch.Generator().manual_seed(number)
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5)
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.queue is None:
            return F.linear(F.linear(x, self.first).tanh(), self.second)
        result: Tensor = QueuedLinear.apply(
            QueuedLinear.apply(x, self.first, self.queue).tanh(), self.second, self.queue
        )
        return result


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def batch(microbatches: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000)
    whole = torch.randn(2, microbatches * TOKENS, WIDTH, generator=draw)
    return whole[0], whole[1]


def gradients_of(parts: dict[int, Part]) -> dict[str, Tensor]:
    return {f"{number}.{name}": p.grad for number, part in parts.items() for name, p in part.named_parameters()}


@functools.cache
def one_after_the_other(stages: int, microbatches: int) -> dict[str, Tensor]:
    """Gradients of the whole stack in one process."""
    parts = {number: Part(number, WeightGradients()) for number in range(stages)}
    for x, target in zip(*(t.chunk(microbatches) for t in batch(microbatches)), strict=True):
        loss_of(nn.Sequential(*parts.values())(x), target).backward()
    return gradients_of(parts)


def make_pipeline(mesh: Mesh, name: str, chunks: int) -> Pipeline:
    shape, placement = (TOKENS, WIDTH), placement_for(name, mesh.pp.size, chunks)
    head_dtype = torch.float32 if name == "1f1b-vocab" else None
    return Pipeline(mesh.pp, name, placement, shape, torch.float32, mesh.device, WeightGradients(), head_dtype)


def train(
    mesh: Mesh, name: str, chunks: int, microbatches: int, queued: bool = True,
    watch: Callable[[Tensor], None] = lambda output: None,
) -> dict[str, Tensor]:  # fmt: skip
    """This rank's gradients after one step of the executor."""
    pipeline = make_pipeline(mesh, name, chunks)
    placement, last = pipeline.placement, mesh.pp.size * chunks - 1
    numbers = [placement.stage_of(mesh.pp.rank, chunk) for chunk in range(chunks)]
    parts = {number: Part(number, pipeline.weight_gradients if queued else None) for number in numbers}
    xs, targets = (t.chunk(microbatches) for t in batch(microbatches))
    losses = torch.zeros(microbatches)

    def forward(chunk: int, i: int, hidden: Tensor | None) -> Tensor:
        assert (hidden is None) == (numbers[chunk] == 0)
        output = parts[numbers[chunk]](xs[i] if hidden is None else hidden)
        watch(output)
        if numbers[chunk] < last or pipeline.head_dtype is not None:
            return output
        losses[i] += loss_of(output, targets[i]).detach()
        return loss_of(output, targets[i])

    def head(i: int, entered: Tensor) -> Tensor | None:
        """A shared loss: each rank takes some of the columns."""
        whole = entered.requires_grad_(torch.is_grad_enabled())
        own = slice(mesh.pp.rank * WIDTH // mesh.pp.size, (mesh.pp.rank + 1) * WIDTH // mesh.pp.size)
        loss = loss_of(whole[:, own], targets[i][:, own])
        losses[i] += loss.detach()
        if not torch.is_grad_enabled():
            return None
        loss.backward()
        return all_reduce_(whole.grad, mesh.pp)

    pipeline.run(microbatches, forward, head)
    gradients, trained = gradients_of(parts), losses.clone()
    assert (trained > 0).all() == (last in numbers or pipeline.head_dtype is not None)
    with torch.no_grad():
        pipeline.run(microbatches, forward, head)
    assert torch.equal(losses, 2 * trained), "evaluation gives other losses than training"
    assert all(g is parts[int(n.split(".")[0])].get_parameter(n.split(".")[1]).grad for n, g in gradients.items())
    return gradients


Cell = tuple[str, int, int]  # schedule, chunks, micro-batches


def train_cells(mesh: Mesh, cells: list[Cell]) -> list[dict[str, Tensor]]:
    return [train(mesh, *cell) for cell in cells]


def joined(of_ranks: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """The gradients of all ranks together, cell by cell."""
    return [functools.reduce(dict.__or__, cell) for cell in zip(*of_ranks, strict=True)]


def cells_for(stages: int) -> list[Cell]:
    chunks = {"interleaved": (1, 2, 3), "zb-v": (2,)}
    numbers = (1, stages, stages + 1, 3 * stages - 1, 4 * stages + 2)
    return [(name, v, m) for name in SCHEDULES for v in chunks.get(name, (1,)) for m in numbers]


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_gradients_are_those_of_micro_batches_one_after_the_other(stages: int) -> None:
    cells = cells_for(stages)
    for (name, chunks, microbatches), gradients in zip(
        cells, joined(run_ranks(train_cells, cells, pp=stages)), strict=True
    ):
        wanted = one_after_the_other(stages * chunks, microbatches)
        assert gradients.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            assert torch.equal(gradients[parameter], gradient), f"{name} {chunks} {microbatches}: {parameter}"


ORACLES = {
    "gpipe": ("ScheduleGPipe", 1), "1f1b": ("Schedule1F1B", 1), "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zb-h1": ("ScheduleInterleavedZeroBubble", 2), "zb-v": ("ScheduleZBVZeroBubble", 2),
}  # fmt: skip


def train_like_torch(mesh: Mesh, microbatches: int) -> list[dict[str, Tensor]]:
    """The same step by torch's schedules."""
    result = []
    for schedule, chunks in ORACLES.values():
        name = "zb-v" if "ZBV" in schedule else "interleaved" if chunks > 1 else "1f1b"
        placement = placement_for(name, mesh.pp.size, chunks)
        numbers = [placement.stage_of(mesh.pp.rank, chunk) for chunk in range(chunks)]
        parts = {number: Part(number, None) for number in numbers}
        count = mesh.pp.size * chunks
        stages = [oracle.PipelineStage(p, n, count, mesh.device, group=mesh.pp.group) for n, p in parts.items()]
        made = getattr(oracle, schedule)(
            stages if chunks > 1 else stages[0], microbatches, loss_fn=loss_of, scale_grads=False
        )
        x, target = batch(microbatches)
        made.step(*([x] if 0 in numbers else []), **({"target": target} if count - 1 in numbers else {}))
        result.append(gradients_of(parts))
    return result


def train_plain(mesh: Mesh, microbatches: int) -> list[dict[str, Tensor]]:
    """Our step with torch's own layers; what has chunks there has them here."""
    cells = [("interleaved" if name == "zb-h1" else name, chunks) for name, (_, chunks) in ORACLES.items()]
    return [train(mesh, name, chunks, microbatches, queued=False) for name, chunks in cells]


def both(mesh: Mesh, microbatches: int) -> list[dict[str, Tensor]]:
    return train_plain(mesh, microbatches) + train_like_torch(mesh, microbatches)


@pytest.mark.parametrize("stages", [2, 4])
def test_gradients_are_those_of_torchs_schedules(stages: int) -> None:
    cells = joined(run_ranks(both, 2 * stages, pp=stages))
    ours, theirs = cells[: len(ORACLES)], cells[len(ORACLES) :]
    for name, mine, other in zip(ORACLES, ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for parameter, gradient in other.items():
            assert torch.equal(mine[parameter], gradient), f"{name}: {parameter}"


class LiveStorages(TorchDispatchMode):
    """Counts the tensors alive among all that operations have made, whoever holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.made[result.untyped_storage()._cdata] = StorageWeakRef(result.untyped_storage())
        return result

    def count(self) -> int:
        self.made = {number: ref for number, ref in self.made.items() if not ref.expired()}
        return len(self.made)


def most_alive(mesh: Mesh, cell: Cell) -> dict[str, Tensor]:
    """The most tensors alive at once, and the most outputs of stages among them."""
    counts, outputs = [0], [0]
    sent: list[StorageWeakRef] = []

    def watch(output: Tensor) -> None:
        sent.append(StorageWeakRef(output.untyped_storage()))
        counts.append(live.count())
        outputs.append(sum(not ref.expired() for ref in sent))

    with LiveStorages() as live:
        train(mesh, *cell, watch=watch)
    return {"tensors": torch.tensor(max(counts)), "outputs": torch.tensor(max(outputs))}


def most_alive_in_cells(mesh: Mesh, cells: list[Cell]) -> list[dict[str, Tensor]]:
    return [most_alive(mesh, cell) for cell in cells]


def test_memory_is_bounded_by_stages_and_not_by_micro_batches() -> None:
    stages = 2
    cells = [
        (name, {"interleaved": 2, "zb-v": 2}.get(name, 1), m) for name in SCHEDULES for m in (6 * stages, 18 * stages)
    ]
    for of_rank in run_ranks(most_alive_in_cells, cells, pp=stages):
        for (name, chunks, _), few, many in zip(cells[::2], of_rank[::2], of_rank[1::2], strict=True):
            if name != "gpipe":  # which keeps every micro-batch's graph
                assert few["tensors"] >= 2 * chunks
                assert many["tensors"] <= few["tensors"] + 2, f"{name}: {few['tensors']}, then {many['tensors']}"
            assert many["outputs"] <= 2 * stages + 2 * chunks, f"{name}: {many['outputs']} outputs are kept"


def test_a_weight_gradient_that_is_never_computed_is_found() -> None:
    """So the tests above do see the queue: without W, a zero-bubble schedule lacks the weights' gradients."""
    pipeline = make_pipeline(single_process_mesh(), "zb-h1", 1)
    program = pipeline.program(2, backward=True)
    kept = [action for action in program.actions if action.kind != "W"]
    pipeline._programs[2, True] = program._replace(actions=kept, gaps=[[] for _ in range(len(kept) + 1)])
    part = Part(0, pipeline.weight_gradients)
    xs, targets = (t.chunk(2) for t in batch(2))
    pipeline.run(2, lambda chunk, i, hidden: loss_of(part(xs[i]), targets[i]))
    assert part.first.grad is None and part.second.grad is None
