"""The feed-forward half of a block: GELU with its bias fused, or a gated activation."""

from megapoly_kernels import Backends, bias_gelu, gated_activation
from torch import Tensor, nn

from megapoly.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megapoly.parallel.tensor import Placement
from megapoly.sections import ModelConfig


class Mlp(nn.Module):
    """up, activation, down. A gated up-projection is one matrix [2, ffn, hidden] with the gate first."""

    def __init__(self, m: ModelConfig, place: Placement, backends: Backends) -> None:
        super().__init__()
        self.activation, self.backend = m.activation, backends.activation
        self.is_gated = m.is_gated
        shape, dim = ((2, m.ffn_size, m.hidden_size), 1) if m.is_gated else ((m.ffn_size, m.hidden_size), 0)
        self.up = ColumnParallelLinear(shape, dim, place, bias=m.add_bias_linear)
        self.down = RowParallelLinear(m.ffn_size, m.hidden_size, place, bias=m.add_bias_linear)

    def forward(self, x_tH: Tensor) -> Tensor:
        """x_tH -> the branch, both [tokens of this rank, hidden]."""
        up = self.up(x_tH, skip_bias_add=True)
        if self.is_gated:
            hidden_Tf = gated_activation(up, self.up.bias, self.activation, self.backend)
        else:
            hidden_Tf = bias_gelu(up, self.up.bias, "tanh" if self.activation == "gelu_tanh" else "none", self.backend)
        result: Tensor = self.down(hidden_Tf)
        return result
