"""The feed-forward half of a block: GELU with its bias fused, or a gated activation."""

from collections.abc import Collection

from megapoly_kernels import Backends, bias_gelu, gated_activation
from torch import Tensor, nn

from megapoly.model.recompute import kept, remade
from megapoly.parallel.linear import ColumnParallelLinear, Remake, RowParallelLinear
from megapoly.parallel.tensor import Placement
from megapoly.sections import ModelConfig


class Mlp(nn.Module):
    """up, activation, down. A gated up-projection is one matrix [2, ffn, hidden] with the gate first."""

    def __init__(
        self, m: ModelConfig, place: Placement, backends: Backends, redone: Collection[str] = ()
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, self.backend = m.activation, backends.activation
        self.is_gated = m.is_gated
        self.run = remade if "mlp_act" in redone else kept
        shape, dim = ((2, m.ffn_size, m.hidden_size), 1) if m.is_gated else ((m.ffn_size, m.hidden_size), 0)
        self.up = ColumnParallelLinear(shape, dim, place, bias=m.add_bias_linear)
        self.down = RowParallelLinear(m.ffn_size, m.hidden_size, place, bias=m.add_bias_linear)

    def forward(self, x_tH: Tensor, remake: Remake | None = None) -> Tensor:
        """x_tH, or what gives it again, -> the branch, both [tokens of this rank, hidden]."""
        (hidden_Tf,), remake = self.run(self._activated, self.up(x_tH, skip_bias_add=True, remake=remake))
        result: Tensor = self.down(hidden_Tf, remake)
        return result

    def _activated(self, up: Tensor) -> tuple[Tensor]:
        if self.is_gated:
            return (gated_activation(up, self.up.bias, self.activation, self.backend),)
        return (bias_gelu(up, self.up.bias, "tanh" if self.activation == "gelu_tanh" else "none", self.backend),)
