"""Micro-batches of token ids and labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens and next-token labels, both int64 [batch, sequence].

    `mask` is fp32 [batch, sequence], 1 where the label counts in the loss; `sources` is int64 [batch], the number
    of the source that each sequence came from. `cu_seqlens` is where documents begin among the batch's tokens, row
    after row and their number last, int32 [documents + 1]: a row begins one too. None where documents are not told
    apart. `begins` is the number of each sequence's first token in the run, int64 [batch]; None of held-out text.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    mask: NDArray[np.float32]
    sources: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32] | None = None
    begins: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Documents:
    """What the ends of documents change within a sequence; the token `eod` ends one and is its last.

    `are_apart`: batches say where documents begin. `masks_eod`: what follows an eod does not count in the loss.
    """

    eod: int
    are_apart: bool
    masks_eod: bool


def batch_of(
    slices: list[NDArray[np.int64]],
    sources: list[int],
    length: int,
    documents: Documents | None = None,
    begins: NDArray[np.int64] | None = None,
) -> Batch:
    """Stack slices of up to length + 1 tokens; what a short slice lacks is masked, and kept apart as a document is."""
    tokens = np.zeros((len(slices), length), dtype=np.int64)
    labels = np.zeros_like(tokens)
    mask = np.zeros(tokens.shape, dtype=np.float32)
    ends = [max(len(piece) - 1, 0) for piece in slices]
    for row, (piece, n) in enumerate(zip(slices, ends, strict=True)):
        if n:
            tokens[row, :n], labels[row, :n], mask[row, :n] = piece[:-1], piece[1:], 1.0
    cu_seqlens = None
    if documents is not None:
        is_end = tokens == documents.eod
        if documents.masks_eod:
            mask[is_end] = 0.0
        if documents.are_apart:
            is_first = np.ones_like(is_end)
            is_first[:, 1:] = is_end[:, :-1]
            for row, n in enumerate(ends):
                is_first[row, n : n + 1], is_first[row, n + 1 :] = True, False
            cu_seqlens = np.append(np.flatnonzero(is_first), is_first.size).astype(np.int32)
    return Batch(tokens, labels, mask, np.asarray(sources, dtype=np.int64), cu_seqlens, begins)
