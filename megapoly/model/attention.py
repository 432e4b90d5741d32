"""Causal self-attention with grouped key/value heads, split by groups over tensor-parallel ranks."""

from megapoly_kernels import Backends, HeadShape, Sequences, rotary_attention
from torch import Tensor, nn

from megapoly.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megapoly.parallel.tensor import Placement
from megapoly.sections import ModelConfig

RotaryTable = tuple[Tensor, Tensor]  # cos and sin, each fp32 [positions, rotary_dim / 2]


class Attention(nn.Module):
    """Packed QKV projection, rotary attention, output projection.

    The packed matrix is [groups, N + 2, head_dim, hidden]: N query heads, then the key, then the value of each group,
    so that a slice by groups is a whole smaller attention. Query head h belongs to group h // N. Where there are more
    ranks than groups, each holds a part of one group's queries, and a copy of its key and value.
    """

    def __init__(self, m: ModelConfig, place: Placement, backends: Backends) -> None:
        super().__init__()
        self.backend = backends.attention
        queries = m.num_attention_heads // m.num_kv_heads
        self.shape = HeadShape(place.kv.size * m.num_kv_heads // place.tp.size, queries // place.kv.size, m.head_dim)
        shape = (m.num_kv_heads, queries + 2, m.head_dim, m.hidden_size)
        self.qkv = ColumnParallelLinear(shape, 0, place, bias=m.add_bias_linear, copied=2)
        self.output = RowParallelLinear(
            m.num_attention_heads * m.head_dim, m.hidden_size, place, bias=m.add_bias_linear
        )

    def forward(self, x_tH: Tensor, sequences: Sequences, table: RotaryTable | None) -> Tensor:
        """x_tH -> the branch, both [tokens of this rank, hidden]."""
        cos, sin = table if table is not None else (None, None)
        # The projection's backward does not read its output: the kernel may rotate it where it lies.
        out_ThK = rotary_attention(
            self.qkv.flat(x_tH), self.shape, sequences, cos, sin, in_place=True, backend=self.backend
        )
        result: Tensor = self.output(out_ThK.flatten(1))
        return result
