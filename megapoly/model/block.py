"""One transformer block: sequential residual (GPT-2, LLaMA) or parallel residual (GPT-NeoX)."""

from collections.abc import Collection
from functools import partial

from megapoly_kernels import Backends, LocalChunks, Sequences
from torch import Tensor, nn

from megapoly.model.attention import Attention, RotaryTable
from megapoly.model.dropout import Dropout
from megapoly.model.mlp import Mlp
from megapoly.model.norm import Norm
from megapoly.model.recompute import remade
from megapoly.parallel.linear import Remake
from megapoly.parallel.tensor import Placement
from megapoly.sections import ModelConfig


def joined(branch_tH: Tensor | None, residual_tH: Tensor) -> Tensor:
    """The residual stream with a pending branch added, both [tokens of this rank, hidden]."""
    return residual_tH if branch_tH is None else residual_tH + branch_tH


class Block(nn.Module):
    """Pre-norm block over a residual stream; the add of a branch is fused into the norm that follows it.

    Sequential: x + attention(norm(x)), then x + mlp(norm(x)). Parallel: x + attention(norm1(x)) + mlp(norm2(x)).
    """

    def __init__(
        self, m: ModelConfig, place: Placement, backends: Backends, redone: Collection[str] = (), number: int = 0
    ) -> None:
        super().__init__()
        self.number = number  # among all layers of the model
        self.redoes_norms = "layernorm" in redone
        self.parallel_residual = m.parallel_residual
        self.attention_norm = Norm(m, place, backends)
        self.attention = Attention(m, place, backends, redone)
        self.mlp_norm = Norm(m, place, backends)
        self.mlp = Mlp(m, place, backends, redone)

    def forward(
        self,
        branch_tH: Tensor | None,
        residual_tH: Tensor,
        sequences: Sequences | LocalChunks,
        table: RotaryTable | None,
        drop: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(pending branch or None, residual) -> (pending branch, residual), all [tokens of this rank, hidden]."""
        normed_tH, residual_tH, remake = self._normed(self.attention_norm, branch_tH, residual_tH)
        branch_tH = self._dropped(self.attention(normed_tH, sequences, table, remake), drop, 0)
        if self.parallel_residual:
            normed_tH, _, remake = self._normed(self.mlp_norm, None, residual_tH)
            return branch_tH + self._dropped(self.mlp(normed_tH, remake), drop, 1), residual_tH
        normed_tH, residual_tH, remake = self._normed(self.mlp_norm, branch_tH, residual_tH)
        return self._dropped(self.mlp(normed_tH, remake), drop, 1), residual_tH

    def _dropped(self, branch_tH: Tensor, drop: Dropout | None, branch: int) -> Tensor:
        return branch_tH if drop is None else drop(branch_tH, 2 * self.number + branch)

    def _normed(
        self, norm: nn.Module, branch_tH: Tensor | None, residual_tH: Tensor
    ) -> tuple[Tensor, Tensor, Remake | None]:
        if not self.redoes_norms:
            return *norm(branch_tH, residual_tH), None
        # The sum is kept anyway; what is redone begins with it.
        (normed_tH, residual_tH), remake = remade(partial(norm, None), joined(branch_tH, residual_tH))
        return normed_tH, residual_tH, remake
