"""The output matrix where all pipeline ranks share it (vocabulary parallel; Yeung et al. 2024, arXiv 2411.05288)."""

import dataclasses

from megapoly_kernels import Backends
from torch import Tensor, nn

from megapoly.checks import padded_vocab_size
from megapoly.parallel.collectives import all_gather
from megapoly.parallel.linear import ColumnParallelLinear
from megapoly.parallel.mesh import Axis, Mesh
from megapoly.parallel.tensor import Placement
from megapoly.parallel.tied import TiedMatrix
from megapoly.sections import Config


class SharedHead(nn.Module):
    """This rank's rows of the output matrix, split over `vocab`: the pipeline ranks x the tensor-parallel ranks.

    Every rank computes the loss of its rows for all tokens, and each gets the whole gradient of what entered. The
    parameter has its global name, which for a tied matrix is the embedding's.
    """

    def __init__(self, cfg: Config, vocab_size: int, mesh: Mesh, place: Placement, backends: Backends) -> None:
        super().__init__()
        self.m, vocab = cfg.model, mesh.vocab
        self.tp = place.tp if place.sequence_parallel else Axis("tp")
        self.place = dataclasses.replace(place, tp=vocab, sequence_parallel=False, overlaps_chunks=False)
        self.backends = backends
        padded = padded_vocab_size(vocab_size, cfg.tokenizer.make_vocab_size_divisible_by, vocab.size)
        shape = (vocab_size, cfg.model.hidden_size)
        self.embedding = nn.ModuleDict()
        if self.m.tied:
            self.embedding["word"] = TiedMatrix(shape, padded, vocab, mesh.pp, place)
        else:
            self.head = ColumnParallelLinear(shape, 0, self.place, bias=False, padded=padded)

    @property
    def tied(self) -> TiedMatrix | None:
        """The matrix, where it is the embedding's as well."""
        if not self.m.tied:
            return None
        matrix = self.embedding["word"]
        assert isinstance(matrix, TiedMatrix)
        return matrix

    @property
    def head_weight(self) -> nn.Parameter:
        """This rank's rows, [vocabulary rows, hidden]."""
        return self.head.weight if self.tied is None else self.tied.weight

    def forward(self, normed_tH: Tensor) -> Tensor:
        """Normed hidden states of this rank's tokens -> those of all tokens."""
        return all_gather(normed_tH, self.tp)

    def own(self, normed_TH: Tensor) -> Tensor:
        """The part of all tokens that is this rank's; the reverse of forward."""
        return normed_TH.chunk(self.tp.size)[self.tp.rank]
