"""One transformer block: sequential residual (GPT-2, LLaMA) or parallel residual (GPT-NeoX)."""

from megapoly_kernels import Backends, Sequences
from torch import Tensor, nn

from megapoly.model.attention import Attention, RotaryTable
from megapoly.model.mlp import Mlp
from megapoly.model.norm import Norm
from megapoly.parallel.tensor import Placement
from megapoly.sections import ModelConfig


class Block(nn.Module):
    """Pre-norm block over a residual stream; the add of a branch is fused into the norm that follows it.

    Sequential: x + attention(norm(x)), then x + mlp(norm(x)). Parallel: x + attention(norm1(x)) + mlp(norm2(x)).
    """

    def __init__(self, m: ModelConfig, place: Placement, backends: Backends) -> None:
        super().__init__()
        self.parallel_residual = m.parallel_residual
        self.attention_norm = Norm(m, place, backends)
        self.attention = Attention(m, place, backends)
        self.mlp_norm = Norm(m, place, backends)
        self.mlp = Mlp(m, place, backends)

    def forward(
        self, branch_tH: Tensor | None, residual_tH: Tensor, sequences: Sequences, table: RotaryTable | None
    ) -> tuple[Tensor, Tensor]:
        """(pending branch or None, residual) -> (pending branch, residual), all [tokens of this rank, hidden]."""
        normed_tH, residual_tH = self.attention_norm(branch_tH, residual_tH)
        branch_tH = self.attention(normed_tH, sequences, table)
        if self.parallel_residual:
            normed_tH, _ = self.mlp_norm(None, residual_tH)
            return branch_tH + self.mlp(normed_tH), residual_tH
        normed_tH, residual_tH = self.mlp_norm(branch_tH, residual_tH)
        return self.mlp(normed_tH), residual_tH
