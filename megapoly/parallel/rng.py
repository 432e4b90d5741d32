"""Initial weights drawn per parameter from (seed, name): no layout changes them."""

import hashlib

import torch
from torch import Tensor

_ROWS_IN_A_BLOCK = 4096


def key(*parts: object) -> int:
    """A 63-bit key of the parts, the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal_shard(
    shape: tuple[int, ...], std: float, seed: int, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Tensor:
    """A part, given by its first indices and sizes, of a whole fp32 parameter of N(0, std^2) that no rank has to hold.

    The whole is drawn in blocks of rows (a row is the last dimension), each from its own key, and only the blocks that
    this part touches are drawn.
    """
    *places, columns = (slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    local = torch.arange(torch.Size(shape[:-1]).numel()).view(shape[:-1])[tuple(places)].reshape(-1)
    result = torch.empty((len(local), sizes[-1]))
    generator = torch.Generator()
    for block in torch.unique(local // _ROWS_IN_A_BLOCK).tolist():
        generator.manual_seed(key(seed, name, block))
        drawn = torch.randn((_ROWS_IN_A_BLOCK, shape[-1]), generator=generator)
        here = local // _ROWS_IN_A_BLOCK == block
        result[here] = drawn[local[here] - block * _ROWS_IN_A_BLOCK, columns]
    return result.mul_(std).view(sizes)
