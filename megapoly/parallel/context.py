"""Context parallel: each rank has a part of every sequence, and gathers the keys and values of the others.

A sequence is cut into 2 x cp chunks, of which rank r holds number r and, from the end, number r again: under a causal
mask early queries see few keys and late ones many, so that all ranks have the same work (zig-zag; Llama 3, Dubey et
al. 2024, arXiv 2407.21783, section 3.3.2). In the flat tokens of a rank, sequences and their chunks keep their order.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapoly.data.batch import Batch
from megapoly.parallel.collectives import start_all_gather, start_reduce_scatter
from megapoly.parallel.mesh import Axis


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Which of its 2 x size chunks a rank holds of each sequence, ascending."""
    return rank, 2 * size - 1 - rank


def local_batch(batch: Batch, cp: Axis) -> Batch:
    """This rank's part of a micro-batch, [batch, sequence / cp]; documents are those of the whole one."""
    if cp.size == 1:
        return batch

    def part(x_BS: NDArray[Any]) -> NDArray[Any]:
        chunk_BS = np.split(x_BS, 2 * cp.size, axis=1)
        return np.concatenate([chunk_BS[chunk] for chunk in chunks_of(cp.rank, cp.size)], axis=1)

    return dataclasses.replace(
        batch, tokens=part(batch.tokens), labels=part(batch.labels), mask=part(batch.mask)
    )  # fmt: skip


@dataclass(frozen=True)
class KeyExchange:
    """The keys and values of `batch` sequences, from every rank's chunks to whole sequences and back."""

    cp: Axis
    batch: int

    def gather(self, x_tF: Tensor) -> Callable[[], Tensor]:
        """Start to gather rows [local tokens, F]; what is returned waits for [batch x sequence, F]."""
        pending = start_all_gather(x_tF, self.cp)

        def in_order() -> Tensor:
            part_RBCt = pending.wait().view(self.cp.size, self.batch, 2, -1, x_tF.shape[1])
            chunks = [part_RBCt[rank, :, 0] for rank in range(self.cp.size)]
            chunks += [part_RBCt[rank, :, 1] for rank in reversed(range(self.cp.size))]
            return torch.cat(chunks, 1).flatten(0, 1)

        return in_order

    def scatter(self, x_TF: Tensor) -> Callable[[], Tensor]:
        """Start to sum [batch x sequence, F] over ranks; what is returned waits for this rank's rows."""
        x_BCtF = x_TF.view(self.batch, 2 * self.cp.size, -1, x_TF.shape[1])
        order = [x_BCtF[:, chunk] for rank in range(self.cp.size) for chunk in chunks_of(rank, self.cp.size)]
        dealt_RBCtF = torch.stack(order).unflatten(0, (self.cp.size, 2)).transpose(1, 2)
        return start_reduce_scatter(dealt_RBCtF.reshape(x_TF.shape), self.cp).wait
