"""Where parameters lie in the flat buffers: buckets in the order in which their gradients become ready.

Ranks that shard optimizer state own equal parts of every bucket (ZeRO-1; Rajbhandari et al. 2020, arXiv 1910.02054). A
rank's shard is its parts of all buckets, one after the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from megapoly.parallel.mesh import Axis, Mesh
from megapoly.parallel.tensor import Named, Shard

ALIGNMENT = 64  # entries: every rank's part begins on a cache line, for wide accesses of the optimizer
WORD = "embedding.word.weight"


@dataclass(frozen=True)
class Bucket:
    """Entries `flat` of the buffers; this rank owns entries `part` of the buffers, which are `owned` of its shard."""

    number: int
    flat: slice
    part: slice
    owned: slice


@dataclass(frozen=True)
class Segment:
    """One shard of a parameter in the buffers: entries begin to end. `is_counted`: this rank counts it in norms."""

    name: str
    parameter: nn.Parameter
    shard: Shard
    bucket: Bucket
    begin: int
    end: int
    is_decayed: bool
    is_counted: bool

    @property
    def offset(self) -> int:
        """Where the first entry would lie in this rank's shard, were all the parameter there; may be negative."""
        return self.begin - self.bucket.part.start + self.bucket.owned.start

    @property
    def owned(self) -> tuple[int, int]:
        """(begin, end) in this rank's shard of what it owns of the parameter; equal where that is nothing."""
        shard = self.bucket.owned
        begin = min(max(self.offset, shard.start), shard.stop)
        return begin, min(max(self.offset + self.end - self.begin, begin), shard.stop)


def is_decayed(named: Named) -> bool:
    """Matrices decay, biases and norms do not; qkv and gated biases have several dimensions but are still biases."""
    return not named[0].endswith("bias") and named[1].dim() > 1


def group(named: Sequence[Named], bucket_size: int) -> list[list[Named]]:
    """Parameters, given in the order of the model, as groups of about bucket_size entries, the model's last ones first.

    The word embedding is the last group, alone: its gradient comes last, a tied one's twice (from the embedding's copy
    at the very end, where the head is shared), and where two stages hold a tied one, the parts they own must match.
    """
    groups: list[list[Named]] = []
    room = 0
    for entry in reversed([entry for entry in named if entry[0] != WORD]):
        if room <= 0:
            groups.append([])
            room = bucket_size
        groups[-1].append(entry)
        room -= entry[1].numel()
    word = [entry for entry in named if entry[0] == WORD]
    return [entries[::-1] for entries in [*groups, word] if entries]


def lay_out(groups: Sequence[Sequence[Named]], mesh: Mesh, tied: bool) -> tuple[list[Bucket], list[Segment]]:
    """Buckets and segments of groups of parameters; within a bucket, what decays comes first.

    `tied`: the word embedding on a later stage than the first is a copy of that one's.
    """
    buckets: list[Bucket] = []
    segments: list[Segment] = []
    begin = 0
    for number, entries in enumerate(groups):
        bucket = _bucket(number, begin, sum(parameter.numel() for _, parameter, _ in entries), mesh.shards)
        buckets.append(bucket)
        for name, parameter, shards in sorted(entries, key=lambda entry: not is_decayed(entry)):
            decayed = is_decayed((name, parameter, shards))
            for shard in shards:
                end = begin + (math.prod(shard.sizes) if len(shards) > 1 else parameter.numel())
                counted = _is_counted(shard, mesh) and not (tied and name == WORD and not mesh.pp.is_first)
                segments.append(Segment(name, parameter, shard, bucket, begin, end, decayed, counted))
                begin = end
        begin = bucket.flat.stop
    return buckets, segments


def _is_counted(shard: Shard, mesh: Mesh) -> bool:
    is_first = mesh.kv.is_first if shard.is_copied else shard.dim is not None or mesh.tp.is_first
    return mesh.instances.is_first and is_first


def _bucket(number: int, begin: int, entries: int, shards: Axis) -> Bucket:
    """A bucket that starts at `begin`, padded to equal aligned parts for all shards."""
    length = -(-entries // (shards.size * ALIGNMENT)) * ALIGNMENT
    part = slice(begin + shards.rank * length, begin + (shards.rank + 1) * length)
    first = begin // shards.size
    return Bucket(number, slice(begin, begin + shards.size * length), part, slice(first, first + length))
