"""Micro-batches of token ids and labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens and next-token labels, both int64 [batch, sequence].

    `mask` is fp32 [batch, sequence], 1 where the label counts in the loss; `sources` is int64 [batch], the number
    of the source that each sequence came from.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    mask: NDArray[np.float32]
    sources: NDArray[np.int64]


def batch_of(slices: list[NDArray[np.int64]], sources: list[int], length: int) -> Batch:
    """Stack slices of up to length + 1 tokens; what a short slice lacks is masked, not counted."""
    tokens = np.zeros((len(slices), length), dtype=np.int64)
    labels = np.zeros_like(tokens)
    mask = np.zeros(tokens.shape, dtype=np.float32)
    for row, piece in enumerate(slices):
        n = len(piece) - 1
        if n > 0:
            tokens[row, :n], labels[row, :n], mask[row, :n] = piece[:-1], piece[1:], 1.0
    return Batch(tokens, labels, mask, np.asarray(sources, dtype=np.int64))
