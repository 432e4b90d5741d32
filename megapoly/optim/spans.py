"""Which stretches of a rank's shard AdamW updates and which Muon, and the state that only one of them has."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapoly.optim.groups import Rules
from megapoly.parallel.buckets import Bucket, Segment
from megapoly.parallel.gradients import FlatBuffers


@dataclass(frozen=True)
class Span:
    """Entries begin to end of this rank's shard, within one bucket, that one optimizer updates; whose they are."""

    bucket: Bucket
    begin: int
    end: int
    segments: tuple[Segment, ...]
    uses_muon: bool

    @property
    def params(self) -> slice:
        """The same entries of the bucket's part of the parameters."""
        first = self.bucket.part.start - self.bucket.owned.start
        return slice(first + self.begin, first + self.end)


def spans_of(buffers: FlatBuffers, rules: Rules) -> list[Span]:
    """The shard in spans, in order and without gaps; a bucket's padding belongs to the last of its spans."""
    spans: list[Span] = []
    for bucket in buffers.buckets:
        mine = [s for s in buffers.segments if s.bucket is bucket]
        begin = bucket.owned.start
        for uses_muon, group in itertools.groupby(mine, lambda s: rules.uses_muon(s.name, s.shard.shape)):
            segments = tuple(group)
            end = bucket.owned.stop if segments[-1] is mine[-1] else segments[-1].owned[1]
            spans.append(Span(bucket, begin, end, segments, uses_muon))
            begin = end
    return spans


class Portion:
    """A flat fp32 quantity of some spans of the shard only, one after the other in `flat`; zero at first."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        borders = list(itertools.accumulate((s.end - s.begin for s in spans), initial=0))
        self.flat = torch.zeros(borders[-1], dtype=torch.float32, device=device)
        self._spans = list(zip(spans, borders, strict=False))

    def of(self, part: Span | Segment) -> Tensor:
        """The entries of a span, or those that this rank owns of a parameter; empty where the quantity has none."""
        begin, end = (part.begin, part.end) if isinstance(part, Span) else part.owned
        for span, first in self._spans:
            if span.begin <= begin and end <= span.end:
                return self.flat[first + begin - span.begin : first + end - span.begin]
        return self.flat[:0]
