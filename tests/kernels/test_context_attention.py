"""Attention of a part of the queries to all keys through the flash-attn package, whose stand-in does what it documents."""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from megapoly_kernels import HeadShape, LocalChunks, Sequences, context_attention, rotary_attention
from torch import Tensor

SHAPE = HeadShape(groups=2, queries=2, head_dim=8)


def flash_attn_func(
    q_BthK: Tensor, k_BSgK: Tensor, v_BSgK: Tensor, *, causal: bool, softmax_scale: float | None
) -> Tensor:
    """[batch, tokens, heads, head_dim]; the causal mask ends at the bottom right."""
    rows, keys = q_BthK.shape[1], k_BSgK.shape[1]
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q_BthK, k_BSgK, v_BSgK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


@dataclass(frozen=True)
class Copies:
    """An exchange among ranks whose other keys and values are at hand; sums nothing."""

    kv_TF: Tensor

    def gather(self, x_tF: Tensor) -> Callable[[], Tensor]:
        return lambda: self.kv_TF

    def scatter(self, x_TF: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("these tests make no gradients")


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def test_chunks_by_flash_attn(flash: None) -> None:
    batch, length = 2, 48
    qkv_TF = torch.randn(batch * length, 2 * 4 * 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = rotary_attention(qkv_TF, SHAPE, Sequences(length), scale=0.3)
    kv_TF = qkv_TF.unflatten(-1, (2, 4, 8))[:, :, 2:].flatten(1)
    for rank in range(3):
        local = LocalChunks.of(Sequences(length), batch, length, (rank, 5 - rank), 6, torch.device("cpu"))
        out = context_attention(qkv_TF[local.own_t], SHAPE, local, Copies(kv_TF), scale=0.3, backend="flash_attn")
        torch.testing.assert_close(out, expected[local.own_t], rtol=1e-12, atol=1e-12)


def test_packed_documents_are_refused_by_flash_attn(flash: None) -> None:
    sequences = Sequences.packed(torch.tensor([0, 5, 16]), 16)
    local = LocalChunks.of(sequences, 1, 16, (0, 3), 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="flash_attn cannot share packed documents"):
        context_attention(torch.zeros(8, 64), SHAPE, local, Copies(torch.zeros(16, 32)), backend="flash_attn")
