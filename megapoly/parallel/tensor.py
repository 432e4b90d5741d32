"""What each tensor-parallel rank holds of every parameter, and the embedding split over the vocabulary.

Capital letters in names are whole dimensions, lower-case letters this rank's share: weight_fH is a slice of weight_FH.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapoly.errors import ConfigError
from megapoly.parallel.collectives import leave_tensor_parallel
from megapoly.parallel.mesh import Axis
from megapoly.parallel.weight_gradients import WeightGradients


@dataclass(frozen=True)
class Shard:
    """Where a rank's part of a parameter lies in the whole.

    `shape` is the whole parameter without padding; along `dim` this rank holds entries `begin` to `end` of it, which
    may be fewer than its tensor has rows (the rest is padding, zero for ever). `is_partial`: each tensor-parallel rank
    has only a part of the gradient, to be summed over the axis. `init` is the name of the initial distribution.
    """

    shape: tuple[int, ...]
    dim: int | None
    begin: int
    end: int
    init: str
    is_partial: bool = False

    @property
    def offsets(self) -> tuple[int, ...]:
        """First index of this part in every dimension of the whole."""
        return tuple(self.begin if d == self.dim else 0 for d in range(len(self.shape)))


@dataclass(frozen=True)
class Placement:
    """How the modules of a rank are placed: their axes, type and device, and where their weight gradients go.

    `overlaps_chunks`: under sequence parallel, products are cut into chunks that overlap with their collectives.
    """

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    cp: Axis = Axis("cp")
    overlaps_chunks: bool = False
    weight_gradients: WeightGradients = field(default_factory=WeightGradients)


def sharded_parameter(
    shape: tuple[int, ...],
    dim: int | None,
    place: Placement,
    init: str,
    *,
    padded: int | None = None,
    is_partial: bool = False,
) -> nn.Parameter:
    """An empty parameter that holds this rank's part of `shape` along `dim`; `padded` is dim's size with padding."""
    if dim is None:
        shard = Shard(shape, None, 0, 0, init, is_partial)
        local = shape
    else:
        whole = padded or shape[dim]
        if whole % place.tp.size:
            raise ConfigError(f"tensor_model_parallel_size ({place.tp.size}) must divide a dimension of {whole}")
        size = whole // place.tp.size
        begin = min(place.tp.rank * size, shape[dim])
        shard = Shard(shape, dim, begin, min(begin + size, shape[dim]), init, is_partial)
        local = (*shape[:dim], size, *shape[dim + 1 :])
    parameter = nn.Parameter(torch.empty(local, dtype=place.dtype, device=place.device))
    parameter.shard = shard  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: nn.Parameter) -> Shard:
    """The Shard that sharded_parameter gave to a parameter."""
    shard: Shard = parameter.shard  # type: ignore[attr-defined]
    return shard


def sharded_parameters(*modules: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """(name, parameter, shard) of every parameter of some modules; tied and shared parameters come once."""
    seen = set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter not in seen:
                seen.add(parameter)
                yield name, parameter, shard_of(parameter)


class VocabParallelEmbedding(nn.Module):
    """Rows of the vocabulary split over ranks; each looks up its own and the sum completes the rest."""

    def __init__(self, vocab_size: int, padded_vocab_size: int, hidden_size: int, place: Placement) -> None:
        super().__init__()
        self.place = place
        self.weight = sharded_parameter((vocab_size, hidden_size), 0, place, "normal", padded=padded_vocab_size)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Token ids [tokens] -> [tokens or this rank's tokens, hidden]."""
        shard = shard_of(self.weight)
        local_T = tokens_T - shard.begin
        is_here_T = (local_T >= 0) & (local_T < shard.end - shard.begin)
        rows_TH = F.embedding(torch.where(is_here_T, local_T, 0), self.weight) * is_here_T[:, None]
        return leave_tensor_parallel(rows_TH, self.place.tp, self.place.sequence_parallel)
