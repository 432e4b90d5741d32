"""Which rank reads which sample, and the batches made of them.

The order of samples is the plan's alone; a loader only deals each global batch out to micro-batches and data-parallel
ranks, so that any number of ranks trains on the same batches.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megapoly.data.batch import Batch, Documents, batch_of
from megapoly.data.batch_sizes import BatchSizes
from megapoly.data.curriculum import Plan
from megapoly.data.indexed import TokenStream
from megapoly.data.infilling import Infilling
from megapoly.data.sampler import permute

WINDOW = 4096  # samples whose places are looked up at once: a step's few would cost nearly as many calls as these


@dataclass(frozen=True)
class Deal:
    """How a global batch is dealt out: micro_batch_size sequences at a time over dp_size ranks."""

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def positions(self, microbatch: int) -> range:
        """Places of the global batch that this rank's micro-batch takes."""
        begin = (microbatch * self.dp_size + self.dp_rank) * self.micro_batch_size
        return range(begin, begin + self.micro_batch_size)


class TrainLoader:
    """Micro-batches of any samples, by random access.

    `sizes` says how many samples a batch has, where that is not constant.
    """

    def __init__(
        self, plan: Plan, streams: Sequence[TokenStream], deal: Deal, sizes: BatchSizes | None = None,
        documents: Documents | None = None, infilling: Infilling | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.streams, self.deal, self.documents, self.infilling = plan, streams, deal, documents, infilling
        self.sizes = sizes or BatchSizes(deal.global_batch_size, deal.global_batch_size)
        self.sampler = plan.sampler()
        self._window = (0, self.sampler.samples(0, 0))

    def _samples(self, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources and offsets of samples first to end."""
        begin, (sources, _, offsets) = self._window
        if not begin <= first <= end <= begin + len(sources):
            until = max(end, min(first + WINDOW, self.plan.num_samples))
            self._window = begin, (sources, _, offsets) = first, self.sampler.samples(first, until)
        return sources[first - begin : end - begin], offsets[first - begin : end - begin]

    def batch(self, first: int, end: int) -> list[Batch]:
        """Micro-batches of samples first to end (at most a global batch); places without a sample are masked.

        So are those whose sample the plan leaves out.

        A sample's sequences, in a stage that has several in a block, come one after the other.
        """
        stage = self.plan.stage_at(first)
        per_sample, length = self.plan.sequences(stage), self.plan.stages[stage].seq_length
        samples = self.sizes.at(first)
        assert 0 < end - first <= samples
        size, given = samples * per_sample, (end - first) * per_sample
        deal = dataclasses.replace(self.deal, global_batch_size=size)
        of_sample, offset_of = self._samples(first, end)
        sources = of_sample.repeat(per_sample)
        offsets = (offset_of[:, None] * per_sample + np.arange(per_sample)).ravel()  # in sequences of the source
        batches = []
        for microbatch in range(deal.num_microbatches):
            # A batch's sequences are shuffled over its places: the mixture is periodic, and a rank that always took
            # the same places could see one source only.
            taken = [permute(place, size, first) for place in deal.positions(microbatch)]
            pieces: list[NDArray[np.int64]] = []
            for i in taken:
                if i >= given or self.plan.leaves_out(first + i // per_sample, first + i // per_sample + 1):
                    pieces.append(np.empty(0, dtype=np.int64))
                    continue
                piece = self.streams[sources[i]].read(offsets[i] * length, (offsets[i] + 1) * length + 1)
                if self.infilling is not None:
                    piece = self.infilling.apply(piece, sources[i], first + i // per_sample, i % per_sample)
                pieces.append(piece)
            origins = [int(sources[i]) if i < given else 0 for i in taken]
            begins = first * self.plan.block_length + np.array(taken, dtype=np.int64) * length
            batches.append(batch_of(pieces, origins, length, self.documents, begins))
        return batches


class ValidLoader:
    """The held-out text of all sources, every token once, in slices of one length, whatever a stage's own."""

    def __init__(
        self, streams: Sequence[TokenStream | None], length: int, deal: Deal, max_batches: int | None,
        documents: Documents | None = None,
    ) -> None:  # fmt: skip
        self.streams, self.length, self.deal, self.documents = streams, length, deal, documents
        slices = [
            (source, begin)
            for source, stream in enumerate(streams)
            if stream is not None
            for begin in range(0, stream.num_tokens - 1, length)
        ]
        if max_batches is not None and len(slices) > max_batches * deal.global_batch_size:
            # Evenly spaced, so that every source keeps its part.
            keep = np.linspace(0, len(slices) - 1, max_batches * deal.global_batch_size).astype(int)
            slices = [slices[i] for i in keep]
        self.slices = slices

    @property
    def num_batches(self) -> int:
        """Global batches of one evaluation."""
        return -(-len(self.slices) // self.deal.global_batch_size)

    def batch(self, number: int) -> list[Batch]:
        """This rank's micro-batches of a global batch; places beyond the last slice are masked."""
        batches = []
        for microbatch in range(self.deal.num_microbatches):
            pieces: list[NDArray[np.int64]] = []
            sources = []
            for place in self.deal.positions(microbatch):
                i = number * self.deal.global_batch_size + place
                source, begin = self.slices[i] if i < len(self.slices) else (0, None)
                stream = self.streams[source]
                if begin is None or stream is None:
                    pieces.append(np.empty(0, dtype=np.int64))
                else:
                    pieces.append(stream.read(begin, min(begin + self.length + 1, stream.num_tokens)))
                sources.append(source)
            batches.append(batch_of(pieces, sources, self.length, self.documents))
        return batches
