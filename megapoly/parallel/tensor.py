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
    """Where a part of a rank's parameter lies in the whole.

    `shape` is the whole parameter without padding; along `dim` this rank holds entries `begin` to `end` of it, which
    may be fewer than its tensor has rows (the rest is padding, zero for ever). `is_partial`: each tensor-parallel rank
    has only a part of the gradient, to be summed over the axis. `init` is the name of the initial distribution.

    A parameter has one shard, but where ranks share key/value heads, whose packed matrix has two: both lie in entry
    `group` of the whole's dimension 0, and begin at index `row` of the tensor's dimension `dim`. `is_copied`: the other
    ranks of the axis `kv` hold the same, each with a part of its gradient.
    """

    shape: tuple[int, ...]
    dim: int | None
    begin: int
    end: int
    init: str
    is_partial: bool = False
    group: int | None = None
    row: int = 0
    is_copied: bool = False

    @property
    def offsets(self) -> tuple[int, ...]:
        """First index of this part in every dimension of the whole."""
        first = (self.group or 0, *(0 for _ in self.shape[1:]))
        return tuple(self.begin if d == self.dim else first[d] for d in range(len(self.shape)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of this part in every dimension, without padding."""
        first = self.shape[0] if self.group is None else 1
        return tuple(self.end - self.begin if d == self.dim else n for d, n in enumerate((first, *self.shape[1:])))

    def held(self, parameter: Tensor) -> Tensor:
        """This part of the rank's tensor, without padding."""
        return parameter if self.dim is None else parameter.narrow(self.dim, self.row, self.end - self.begin)


@dataclass(frozen=True)
class Placement:
    """How the modules of a rank are placed: their axes, type and device, and where their weight gradients go.

    `overlaps_chunks`: under sequence parallel, products are cut into chunks that overlap with their collectives. `fp8`:
    the products of linear layers are in FP8, those that give weight gradients apart.
    """

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    cp: Axis = Axis("cp")
    kv: Axis = Axis("kv")
    overlaps_chunks: bool = False
    fp8: bool = False
    weight_gradients: WeightGradients = field(default_factory=WeightGradients)


def sharded_parameter(
    shape: tuple[int, ...],
    dim: int | None,
    place: Placement,
    init: str,
    *,
    padded: int | None = None,
    is_partial: bool = False,
    copied: int = 0,
) -> nn.Parameter:
    """An empty parameter that holds this rank's part of `shape` along `dim`; `padded` is dim's size with padding.

    Where the ranks of the axis `kv` share an entry of dimension 0, each holds its part of dimension 1, and a copy of
    that dimension's last `copied` entries.
    """
    if copied and place.kv.size > 1:
        group, own = place.tp.rank // place.kv.size, (shape[1] - copied) // place.kv.size
        begin, common = place.kv.rank * own, shape[1] - copied
        shards = (
            Shard(shape, 1, begin, begin + own, init, group=group),
            Shard(shape, 1, common, shape[1], init, group=group, row=own, is_copied=True),
        )
        return _with_shards((1, own + copied, *shape[2:]), shards, place)
    if dim is None:
        return _with_shards(shape, (Shard(shape, None, 0, 0, init, is_partial),), place)
    whole = padded or shape[dim]
    if whole % place.tp.size:
        raise ConfigError(f"tensor_model_parallel_size ({place.tp.size}) must divide a dimension of {whole}")
    size = whole // place.tp.size
    begin = min(place.tp.rank * size, shape[dim])
    shard = Shard(shape, dim, begin, min(begin + size, shape[dim]), init, is_partial)
    return _with_shards((*shape[:dim], size, *shape[dim + 1 :]), (shard,), place)


def _with_shards(local: tuple[int, ...], shards: tuple[Shard, ...], place: Placement) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(local, dtype=place.dtype, device=place.device))
    parameter.shards = shards  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: nn.Parameter) -> Shard:
    """The Shard of a parameter that has one."""
    (shard,) = parameter.shards  # type: ignore[attr-defined]
    return shard


Named = tuple[str, nn.Parameter, tuple[Shard, ...]]


def sharded_parameters(*modules: nn.Module) -> Iterator[Named]:
    """(name, parameter, shards) of every parameter of some modules; tied and shared parameters come once."""
    seen = set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter not in seen:
                seen.add(parameter)
                yield name, parameter, parameter.shards  # type: ignore[attr-defined]


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
        return looked_up(self.weight, local_T, is_here_T, self.place)


def looked_up(weight_vH: Tensor, local_T: Tensor, is_here_T: Tensor, place: Placement) -> Tensor:
    """Rows of the tokens that this rank has, completed by the other ranks': [tokens or this rank's tokens, hidden]."""
    rows_TH = F.embedding(torch.where(is_here_T, local_T, 0), weight_vH) * is_here_T[:, None]
    return leave_tensor_parallel(rows_TH, place.tp, place.sequence_parallel)
