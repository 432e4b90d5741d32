"""A guard against silent corruption: the bits of parameters that ranks hold alike are compared by their hashes."""

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.errors import Echo, ReplicaError
from megapoly.parallel.buckets import WORD, Segment
from megapoly.parallel.collectives import all_gather, all_reduce_
from megapoly.parallel.gradients import FlatBuffers
from megapoly.parallel.mesh import Axis

CHUNK = 1 << 22  # entries hashed at once: bounds the memory of their int64 copies
FACTOR = 6364136223846793005  # odd, so that what distinguishes two sums is never multiplied away


def hash_bits(x: Tensor) -> Tensor:
    """An int64 scalar of a tensor's bits that changes with any one of them; the same on every device.

    Words are added up with odd weights that grow with their place, modulo 2^64: the order of a sum does not matter.
    """
    words = x.detach().flatten().view(torch.int32 if x.element_size() == 4 else torch.int16)
    weights = torch.arange(1, 2 * min(len(words), CHUNK) + 1, 2, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for chunk in words.split(CHUNK):
        total = FACTOR * total + (chunk * weights[: len(chunk)]).sum()
    return total


@torch.no_grad()
def check_replicas(buffers: FlatBuffers, step: int) -> None:
    """Compare the parameters' bits over everyone who holds them too; waits for the device.

    These are the replicas; tensor-parallel ranks for what they do not split, or the key/value heads that they share;
    the ends of the pipeline for a tied matrix. Raises ReplicaError on one rank, with who differs and in what, and Echo
    on all others.
    """
    buffers.wait_params()
    mesh = buffers.mesh
    hash_at = {s.begin: hash_bits(buffers.params[s.begin : s.end]) for s in buffers.segments}
    holders = [
        (mesh.replicas, buffers.segments),
        (mesh.tp, [s for s in buffers.segments if s.shard.dim is None]),
        (mesh.kv, [s for s in buffers.segments if s.shard.is_copied]),
        (mesh.embedding, [s for s in buffers.segments if buffers.tied and s.name == WORD]),
    ]
    alike = [(axis, torch.stack([hash_at[s.begin] for s in held]), held) for axis, held in holders if held]
    differs = torch.stack([_differs(hashes_P, axis) for axis, hashes_P, _ in alike])
    first = torch.where(differs.any(), mesh.world.rank, mesh.world.size)
    speaker = int(all_reduce_(first, mesh.world, dist.ReduceOp.MIN))
    if speaker == mesh.world.size:
        return
    lines = [
        _describe(held, hashes_P, axis, mesh.world.rank)
        for (axis, hashes_P, held), is_different in zip(alike, differs.tolist(), strict=True)
        if is_different
    ]
    if mesh.world.rank != speaker:
        raise Echo(f"rank {speaker} found weights that differ")
    raise ReplicaError(f"after step {step} {lines[0]}: memory or a device is faulty; go on from an earlier checkpoint")


def _differs(hashes_P: Tensor, axis: Axis) -> Tensor:
    """Whether any rank of the axis has another hash of all these parameters together."""
    everyone = all_gather(hash_bits(hashes_P.view(torch.int32))[None], axis)
    return (everyone != everyone[0]).any()


def _describe(held: list[Segment], hashes_P: Tensor, axis: Axis, rank: int) -> str:
    """Who of the axis differs from the majority, and in what; all ranks of the axis call it together."""
    hashes_RP = all_gather(hashes_P, axis).view(axis.size, -1)
    ranks = all_gather(torch.tensor([rank], device=hashes_P.device), axis).tolist()
    different = (hashes_RP != hashes_RP[0]).any(0).nonzero().flatten().tolist()
    column = hashes_RP[:, different[0]].tolist()
    usual = max(column, key=column.count)
    has_majority = 2 * column.count(usual) > axis.size
    odd = [number for number, found in zip(ranks, column, strict=True) if found != usual or not has_majority]
    who = f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
    than = f"most of the {axis.size} ranks that hold the same" if has_majority else "each other"
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    verb = "differs" if len(odd) == 1 else "differ"
    return f"{who} {verb} from {than} in the bits of '{held[different[0]].name}'{more}"
