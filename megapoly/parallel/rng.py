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
    shape: tuple[int, ...], std: float, seed: int, name: str, dim: int | None, begin: int, end: int
) -> Tensor:
    """Entries begin..end along `dim` of a whole fp32 parameter of N(0, std^2) that no rank has to hold.

    The whole is drawn in blocks of rows (a row is the last dimension), each from its own key, and only the blocks that
    this shard touches are drawn. `dim` None takes everything.
    """
    rows = torch.arange(torch.Size(shape[:-1]).numel()).view(shape[:-1])
    columns = slice(None)
    if dim is not None and dim == len(shape) - 1:
        columns = slice(begin, end)
    elif dim is not None:
        rows = rows.narrow(dim, begin, end - begin)
    local = rows.reshape(-1)
    width = len(range(shape[-1])[columns])
    result = torch.empty((len(local), width))
    generator = torch.Generator()
    for block in torch.unique(local // _ROWS_IN_A_BLOCK).tolist():
        generator.manual_seed(key(seed, name, block))
        drawn = torch.randn((_ROWS_IN_A_BLOCK, shape[-1]), generator=generator)
        here = local // _ROWS_IN_A_BLOCK == block
        result[here] = drawn[local[here] - block * _ROWS_IN_A_BLOCK, columns]
    return result.mul_(std).view(*rows.shape, width)
