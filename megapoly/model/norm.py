"""LayerNorm and RMSNorm as modules over the fused operations."""

from megapoly_kernels import Backends, layer_norm, rms_norm
from torch import Tensor, nn

from megapoly.parallel.tensor import Placement, sharded_parameter
from megapoly.sections import ModelConfig


class Norm(nn.Module):
    """Adds a branch to the residual stream and normalises the sum; parameters are whole on every rank.

    Under sequence parallel a rank sees only its tokens, so that its gradient is a part of the sum over the axis.
    """

    def __init__(self, m: ModelConfig, place: Placement, backends: Backends) -> None:
        super().__init__()
        self.eps, self.backend = m.norm_epsilon, backends.norm
        is_partial = place.sequence_parallel
        self.weight = sharded_parameter((m.hidden_size,), None, place, "ones", is_partial=is_partial)
        self.bias: nn.Parameter | None = None
        if m.normalization == "LayerNorm":
            self.bias = sharded_parameter((m.hidden_size,), None, place, "zeros", is_partial=is_partial)

    def forward(self, branch_tH: Tensor | None, residual_tH: Tensor) -> tuple[Tensor, Tensor]:
        """(branch or None, residual), both [tokens, hidden] -> (normed in the weights' type, new residual)."""
        if self.bias is None:
            return rms_norm(branch_tH, residual_tH, self.weight, self.eps, self.backend)
        return layer_norm(branch_tH, residual_tH, self.weight, self.bias, self.eps, self.backend)
