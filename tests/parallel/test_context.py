"""Context parallel: any share of the sequences trains like one process, and all shares are the same work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megapoly_kernels import HeadShape, LocalChunks, Sequences, context_attention, rotary_attention, rotary_table
from ranks import run_ranks
from test_parity import STEPS, assert_same_training, reference, steps_of
from tiny_runs import tiny_config
from torch import Tensor

from megapoly.checks import check
from megapoly.data.batch import Batch
from megapoly.errors import ConfigError
from megapoly.parallel.context import KeyExchange, chunks_of, local_batch
from megapoly.parallel.mesh import Axis, Mesh
from megapoly.sections import Config

CPU = torch.device("cpu")
SHAPE = HeadShape(groups=2, queries=3, head_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize(
    ("family", "cp", "tp", "pp", "dp", "options"),
    [
        ("gpt2", 2, 1, 1, 1, {}),
        ("llama", 4, 1, 1, 1, {"recompute_granularity": "selective"}),
        ("gpt_neox", 2, 2, 1, 1, {"sequence_parallel": True}),
        ("llama", 2, 2, 2, 1, {"sequence_parallel": True, "pipeline_schedule": "zb-h1"}),
        ("gpt2", 2, 2, 1, 2, {"sequence_parallel": True, "micro_batch_size": 2}),
        ("gpt_neox", 4, 1, 2, 1, {"micro_batch_size": 2, "recompute_granularity": "full"}),
    ],
)
def test_every_layout_trains_like_one_process(
    family: str, cp: int, tp: int, pp: int, dp: int, options: dict[str, Any], folder: Path
) -> None:
    cfg = tiny_config(
        folder, family, STEPS, context_parallel_size=cp, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, **options,
    )  # fmt: skip
    for of_rank in run_ranks(steps_of, cfg, cp=cp, tp=tp, pp=pp, dp=dp):
        assert_same_training(of_rank, reference(family, folder))


def test_the_scale_of_mup_is_kept(folder: Path) -> None:
    def cfg(**layout: int) -> Config:
        return tiny_config(folder, "llama", STEPS, use_mup=True, mup_base_hidden_size=36, **layout)

    alone = run_ranks(steps_of, cfg())[0]
    assert_same_training(run_ranks(steps_of, cfg(context_parallel_size=2), cp=2)[1], alone)


def local_chunks(sequences: Sequences, batch: int, length: int, cp: Axis) -> LocalChunks:
    return LocalChunks.of(sequences, batch, length, chunks_of(cp.rank, cp.size), 2 * cp.size, CPU)


def wide(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_of_attention(mesh: Mesh, qkv_TF: Tensor, upstream_ThK: Tensor, borders: list[int], batch: int) -> Any:
    """(tokens, output, gradient of the packed buffer) of this rank."""
    tokens, table = len(qkv_TF), [x.double() for x in rotary_table(len(qkv_TF), 16, 100.0)]
    sequences = Sequences.packed(torch.tensor(borders), tokens) if borders else Sequences(tokens // batch)
    local = local_chunks(sequences, batch, tokens // batch, mesh.cp)
    leaf = qkv_TF[local.own_t].requires_grad_()
    out_thK = context_attention(leaf, SHAPE, local, KeyExchange(mesh.cp, batch), *table)
    out_thK.backward(upstream_ThK[local.own_t])
    return local.own_t, out_thK.detach(), leaf.grad


@pytest.mark.parametrize(
    ("cp", "batch", "borders"),
    [
        (2, 2, []),
        (2, 1, [0, 1, 2, 37, 38, 72]),  # documents of one token, one over three chunks of 18
        (4, 2, [0, 5, 40, 41, 71, 72, 73, 144]),  # rows of 72: chunks of 9
        (4, 1, [0, 8, 16, 24, 32, 40, 48, 56, 64]),  # a document each chunk
    ],
)
def test_shares_make_up_attention_and_its_gradients(cp: int, batch: int, borders: list[int]) -> None:
    tokens = borders[-1] if borders else 72
    qkv_TF, upstream_ThK = wide(tokens, 2 * 5 * 16, seed=1), wide(tokens, 6, 16, seed=2)
    whole = qkv_TF.clone().requires_grad_()
    table = [x.double() for x in rotary_table(tokens, 16, 100.0)]
    sequences = Sequences.packed(torch.tensor(borders), tokens) if borders else Sequences(tokens // batch)
    expected = rotary_attention(whole, SHAPE, sequences, *table)
    expected.backward(upstream_ThK)
    seen: list[int] = []
    for own_t, out_thK, grad_tF in run_ranks(share_of_attention, qkv_TF, upstream_ThK, borders, batch, cp=cp):
        torch.testing.assert_close(out_thK, expected.detach()[own_t], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_tF, whole.grad[own_t], rtol=1e-12, atol=1e-12)
        seen += own_t.tolist()
    assert sorted(seen) == list(range(tokens))


def exchanged(mesh: Mesh, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = batch * 6 * mesh.cp.size
    x_tF, y_TF = wide(tokens // mesh.cp.size, 3, seed=mesh.cp.rank), wide(tokens, 3, seed=9 + mesh.cp.rank)
    exchange = KeyExchange(mesh.cp, batch)
    return x_tF, y_TF, exchange.gather(x_tF)(), exchange.scatter(y_TF)()


@pytest.mark.parametrize(("cp", "batch"), [(2, 1), (3, 2)])
def test_the_exchange_orders_tokens_and_its_scatter_is_its_transpose(cp: int, batch: int) -> None:
    ranks = run_ranks(exchanged, batch, cp=cp)
    length = 6 * cp
    for rank, (x_tF, _, gathered_TF, scattered_tF) in enumerate(ranks):
        own_t = local_chunks(Sequences(length), batch, length, Axis("cp", rank, cp)).own_t
        for _, _, at_other, _ in ranks:
            assert torch.equal(at_other[own_t], x_tF)
        assert torch.equal(gathered_TF, ranks[0][2])
        torch.testing.assert_close(scattered_tF, sum(y_TF[own_t] for _, y_TF, _, _ in ranks))


def test_a_batch_is_dealt_out_in_the_same_order() -> None:
    token_BS = np.arange(48).reshape(2, 24)
    batch = Batch(token_BS, token_BS + 1, (token_BS % 5 > 0).astype(np.float32), np.array([3, 4]))
    for rank in range(3):
        cp = Axis("cp", rank, 3)
        part = local_batch(batch, cp)
        own_BS = local_chunks(Sequences(24), 2, 24, cp).own_t.view(2, 8).numpy()
        assert (part.tokens == own_BS).all() and (part.labels == own_BS + 1).all()
        assert (part.mask == (own_BS % 5 > 0)).all() and (part.sources == batch.sources).all()
    assert local_batch(batch, Axis("cp")) is batch


@pytest.mark.parametrize("cp", [2, 3, 8])
def test_every_rank_attends_to_as_many_keys(cp: int) -> None:
    length = 96 * cp
    for rank in range(cp):
        local = local_chunks(Sequences(length), 2, length, Axis("cp", rank, cp))
        seen = (local.own_t - local.first_t + 1).sum().item()
        assert seen == 2 * length * (length + 1) // 2 // cp
        assert seen == (local.end_T - local.begin_T).sum().item()  # the same pairs, counted by keys


@pytest.mark.parametrize(
    ("leaves", "world", "message"),
    [
        ({"context_parallel_size": 3}, 3, r"cuts sequences into 6 chunks, .*\(16\).* use seq_length 12 or 18, or .* 2$"),
        ({"context_parallel_size": 16}, 16, r"into 32 chunks, .*\(16\).* use seq_length 32, or context_.* 8$"),
        ({"context_parallel_size": 5, "seq_length": 15}, 5, r"use seq_length 10 or 20, or context_parallel_size 1$"),
        ({"context_parallel_size": 0}, 1, r"context_parallel_size \(0\) must be positive"),
        ({"context_parallel_size": 2}, 3, r"\(1\) x context_parallel_size \(2\) x .* = 2 must divide the world size \(3\)"),
        (
            {"context_parallel_size": 8, "tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 16},
            16, None,
        ),
        (
            {"context_parallel_size": 8, "tensor_model_parallel_size": 4, "sequence_parallel": True, "seq_length": 16,
             "num_query_groups": 4, "num_attention_heads": 12},
            32, r"\(4\) must divide micro_batch_size x seq_length / context_parallel_size \(2\)",
        ),
        ({"context_parallel_size": 2, "global_batch_size": 6}, 8, r"data-parallel size \(4\) = 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(
    leaves: dict[str, Any], world: int, message: str | None, folder: Path
) -> None:
    cfg = tiny_config(folder, "gpt2", **leaves)
    if message is None:
        assert check(cfg, world) == 1
        return
    with pytest.raises(ConfigError, match=message):
        check(cfg, world)
