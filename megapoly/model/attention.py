"""Causal self-attention with grouped key/value heads, split by groups over tensor-parallel ranks."""

from megapoly_kernels import rotary_attention
from torch import Tensor, nn

from megapoly.config import ModelConfig
from megapoly.parallel.tensor import ColumnParallelLinear, Placement, RowParallelLinear

RotaryTable = tuple[Tensor, Tensor]  # cos and sin, each fp32 [positions, rotary_dim / 2]


class Attention(nn.Module):
    """Packed QKV projection, rotary attention, output projection.

    The packed matrix is [groups, N + 2, head_dim, hidden]: N query heads, then the key, then the value of each group,
    so that a slice by groups is a whole smaller attention. Query head h belongs to group h // N.
    """

    def __init__(self, m: ModelConfig, place: Placement) -> None:
        super().__init__()
        self.queries = m.num_attention_heads // m.num_kv_heads
        shape = (m.num_kv_heads, self.queries + 2, m.head_dim, m.hidden_size)
        self.qkv = ColumnParallelLinear(shape, 0, place, bias=m.add_bias_linear)
        self.output = RowParallelLinear(
            m.num_attention_heads * m.head_dim, m.hidden_size, place, bias=m.add_bias_linear
        )

    def forward(self, x_TH: Tensor, batch: int, table: RotaryTable | None) -> Tensor:
        """x_TH [batch x sequence, hidden] -> the branch, [tokens of this rank, hidden]."""
        qkv_BSgnK = self.qkv(x_TH).unflatten(0, (batch, -1))
        q_BShK = qkv_BSgnK[:, :, :, : self.queries].flatten(2, 3)
        k_BSgK, v_BSgK = qkv_BSgnK[:, :, :, self.queries :].unbind(3)
        cos, sin = table if table is not None else (None, None)
        out_BShK = rotary_attention(q_BShK, k_BSgK, v_BSgK, cos, sin)
        result: Tensor = self.output(out_BShK.flatten(0, 1).flatten(1, 2))
        return result
