"""Causal self-attention with grouped key/value heads, split by groups over tensor-parallel ranks."""

from collections.abc import Collection
from functools import partial

from megapoly_kernels import Backends, HeadShape, LocalChunks, Sequences, context_attention, rotary_attention
from torch import Tensor, nn

from megapoly.model.recompute import kept, remade
from megapoly.parallel.context import KeyExchange
from megapoly.parallel.linear import ColumnParallelLinear, Remake, RowParallelLinear
from megapoly.parallel.tensor import Placement
from megapoly.sections import ModelConfig

# Cos and sin, each fp32 [positions, rotary_dim / 2]; the tokens' positions, int32, where not those in their sequences.
RotaryTable = tuple[Tensor, Tensor, Tensor | None]


class Attention(nn.Module):
    """Packed QKV projection, rotary attention, output projection.

    The packed matrix is [groups, N + 2, head_dim, hidden]: N query heads, then the key, then the value of each group,
    so that a slice by groups is a whole smaller attention. Query head h belongs to group h // N. Where there are more
    ranks than groups, each holds a part of one group's queries, and a copy of its key and value.
    """

    def __init__(
        self, m: ModelConfig, place: Placement, backends: Backends, redone: Collection[str] = ()
    ) -> None:  # fmt: skip
        super().__init__()
        self.run_core = remade if "core_attn" in redone else kept
        self.backend, self.scale, self.cp = backends.attention, m.softmax_scale, place.cp
        queries = m.num_attention_heads // m.num_kv_heads
        self.shape = HeadShape(place.kv.size * m.num_kv_heads // place.tp.size, queries // place.kv.size, m.head_dim)
        shape = (m.num_kv_heads, queries + 2, m.head_dim, m.hidden_size)
        self.qkv = ColumnParallelLinear(shape, 0, place, bias=m.add_bias_linear, copied=2)
        self.output = RowParallelLinear(
            m.num_attention_heads * m.head_dim, m.hidden_size, place, bias=m.add_bias_linear
        )

    def forward(
        self, x_tH: Tensor, sequences: Sequences | LocalChunks, table: RotaryTable | None, remake: Remake | None = None
    ) -> Tensor:
        """x_tH, or what gives it again, -> the branch, both [tokens of this rank, hidden]."""
        core = partial(self._core, sequences=sequences, table=table)
        (out_Tf,), remake = self.run_core(core, self.qkv.flat(x_tH, remake=remake))
        result: Tensor = self.output(out_Tf, remake)
        return result

    def _core(self, qkv_TF: Tensor, sequences: Sequences | LocalChunks, table: RotaryTable | None) -> tuple[Tensor]:
        cos, sin, position_T = table if table is not None else (None, None, None)
        if isinstance(sequences, LocalChunks):
            exchange = KeyExchange(self.cp, sequences.batch)
            out_ThK = context_attention(
                qkv_TF, self.shape, sequences, exchange, cos, sin, scale=self.scale, backend=self.backend
            )
        else:
            # The projection's backward does not read its output: the kernel may rotate it where it lies, but only once.
            is_free = self.run_core is kept
            out_ThK = rotary_attention(
                qkv_TF, self.shape, sequences, cos, sin, position_T=position_T, scale=self.scale, in_place=is_free,
                backend=self.backend,
            )  # fmt: skip
        return (out_ThK.flatten(1),)
