"""One transformer block: sequential residual (GPT-2, LLaMA) or parallel residual (GPT-NeoX)."""

import torch
from torch import Tensor, nn

from megapoly.config import ModelConfig
from megapoly.model.attention import Attention, RotaryTable
from megapoly.model.mlp import Mlp
from megapoly.model.norm import Norm
from megapoly.parallel.collectives import enter_tensor_parallel
from megapoly.parallel.mesh import Axis


class Block(nn.Module):
    """Pre-norm block over a residual stream; the add of a branch is fused into the norm that follows it.

    Sequential: x + attention(norm(x)), then x + mlp(norm(x)). Parallel: x + attention(norm1(x)) + mlp(norm2(x)).
    """

    def __init__(
        self, m: ModelConfig, tp: Axis, *, sequence_parallel: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.parallel_residual = m.parallel_residual
        kwargs = {"sequence_parallel": sequence_parallel, "dtype": dtype, "device": device}
        self.attention_norm = Norm(m, tp, **kwargs)
        self.attention = Attention(m, tp, **kwargs)
        self.mlp_norm = Norm(m, tp, **kwargs)
        self.mlp = Mlp(m, tp, **kwargs)

    def forward(
        self, branch_tH: Tensor | None, residual_tH: Tensor, batch: int, table: RotaryTable | None
    ) -> tuple[Tensor, Tensor]:
        """(pending branch or None, residual) -> (pending branch, residual), all [tokens of this rank, hidden]."""
        normed_tH, residual_tH = self.attention_norm(branch_tH, residual_tH)
        branch_tH = self.attention(self._enter(normed_tH), batch, table)
        if self.parallel_residual:
            normed_tH, _ = self.mlp_norm(None, residual_tH)
            return branch_tH + self.mlp(self._enter(normed_tH)), residual_tH
        normed_tH, residual_tH = self.mlp_norm(branch_tH, residual_tH)
        return self.mlp(self._enter(normed_tH)), residual_tH

    def _enter(self, x_tH: Tensor) -> Tensor:
        return enter_tensor_parallel(x_tH, self.tp, self.sequence_parallel)
