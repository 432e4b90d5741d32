"""Matrix products with the collective before or after them, whole or in chunks of tokens that overlap with it.

The collectives are those of sequence parallel (Korthikanti et al. 2022, arXiv 2205.05198), or else an all-reduce. In
chunks (as Wang et al. 2023, ASPLOS, decompose them; Megatron-LM's tp_comm_overlap), one chunk travels while another is
multiplied; a chunk is a part of the tokens of every rank.
"""

import torch
from torch import Tensor

from megapoly.parallel.collectives import Pending, start_all_gather, start_all_reduce_, start_reduce_scatter
from megapoly.parallel.fp8 import fp8_product
from megapoly.parallel.tensor import Placement

CHUNKS = 4


def _product(
    a_TK: Tensor, b_KN: Tensor, place: Placement, bias_N: Tensor | None = None, is_gradient: bool = False
) -> Tensor:
    if place.fp8:
        return fp8_product(a_TK, b_KN, bias_N, is_gradient=is_gradient)
    return torch.mm(a_TK, b_KN) if bias_N is None else torch.addmm(bias_N, a_TK, b_KN)


def gathered_product(
    a_tK: Tensor, b_KN: Tensor, place: Placement, bias_N: Tensor | None = None, *, is_gradient: bool = False,
    keeps: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(a b + bias, a) of all tokens, which come together under sequence parallel; with `keeps` a is never None.

    `is_gradient`: a is a gradient, which FP8 treats in another way.
    """
    if not place.sequence_parallel:
        return _product(a_tK, b_KN, place, bias_N, is_gradient), a_tK
    if not place.overlaps_chunks:
        a_TK = start_all_gather(a_tK, place.tp).wait()
        return _product(a_TK, b_KN, place, bias_N, is_gradient), a_TK
    ranks, tokens = place.tp.size, len(a_tK)
    y_TN = a_tK.new_empty((ranks * tokens, b_KN.shape[1]))  # no view: attention may rotate it in place
    y_RtN = y_TN.unflatten(0, (ranks, tokens))
    a_RtK = a_tK.new_empty((ranks, *a_tK.shape)) if keeps else None
    b_RKN = b_KN.expand(ranks, -1, -1)
    spans = _spans(tokens)
    following = start_all_gather(a_tK[spans[0]], place.tp)
    for i, span in enumerate(spans):
        a_RnK = following.wait().unflatten(0, (ranks, -1))
        if i + 1 < len(spans):
            following = start_all_gather(a_tK[spans[i + 1]], place.tp)
        if bias_N is None:
            torch.bmm(a_RnK, b_RKN, out=y_RtN[:, span])
        else:
            torch.baddbmm(bias_N, a_RnK, b_RKN, out=y_RtN[:, span])
        if a_RtK is not None:
            a_RtK[:, span] = a_RnK
    return y_TN, None if a_RtK is None else a_RtK.flatten(0, 1)


def summed_product(a_Tk: Tensor, b_kN: Tensor, place: Placement, *, is_gradient: bool = False) -> Pending:
    """a b on its way to being summed over the ranks, under sequence parallel for this rank's tokens."""
    if not place.sequence_parallel:
        return start_all_reduce_(_product(a_Tk, b_kN, place, is_gradient=is_gradient), place.tp)
    if not place.overlaps_chunks:
        return start_reduce_scatter(_product(a_Tk, b_kN, place, is_gradient=is_gradient), place.tp)
    ranks, tokens = place.tp.size, len(a_Tk) // place.tp.size
    y_tN = a_Tk.new_empty((tokens, b_kN.shape[1]))
    a_Rtk, b_RkN = a_Tk.unflatten(0, (ranks, -1)), b_kN.expand(ranks, -1, -1)
    parts = [
        start_reduce_scatter(torch.bmm(a_Rtk[:, span], b_RkN).flatten(0, 1), place.tp, y_tN[span])
        for span in _spans(tokens)
    ]
    return Pending(y_tN, parts)


def _spans(tokens: int) -> list[slice]:
    size = -(-tokens // CHUNKS)
    return [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]
