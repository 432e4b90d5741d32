"""The closed forms of plan/ equal what the real training step does, as one rank of 256 or 2,048, to the last byte."""

from typing import Any

import pytest
from fake_run import Collectives, Kept, fake_run, name_groups
from tiny_runs import FAMILIES, VOCAB

from megapoly.checks import check
from megapoly.config import load_config
from megapoly.parallel.mesh import Mesh
from megapoly.plan.communication import Calls, Traffic, step_traffic, total
from megapoly.plan.memory import activation_bytes, num_parameters, state_bytes
from megapoly.plan.seat import Seat
from megapoly.sections import Config
from megapoly.train.prepare import resolve
from megapoly.train.setup import Run, layer_split
from megapoly.train.step import train_step

POLYLM = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "micro_batch_size": 1}
# 48 x 12 x 8,192^2 entries in blocks and 2.1 billion in the embedding.
FORTY = POLYLM | {
    "num_layers": 48, "hidden_size": 8192, "num_attention_heads": 64, "seq_length": 4096,
    "max_position_embeddings": 4096, "pipeline_model_parallel_size": 8,
}  # fmt: skip
LLAMA = {
    "position_embedding_type": "rope", "normalization": "RMSNorm", "activation": "swiglu", "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True, "num_query_groups": 8, "ffn_hidden_size": 22016,
}  # fmt: skip
LARGE: dict[str, tuple[int, dict[str, Any]]] = {
    "13b, TP 8 PP 4 DP 8": (256, POLYLM | {"global_batch_size": 64}),
    "13b, CP 2, 2 chunks": (
        256,
        POLYLM | {"global_batch_size": 32, "context_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    ),
    "13b, a shared head": (256, POLYLM | {"global_batch_size": 64, "pipeline_vocab_parallel": True}),
    "40b, TP 8 PP 8 DP 32": (2048, FORTY | {"global_batch_size": 320}),
    "40b llama, CP 2, 2 chunks, 2 instances": (
        2048,
        FORTY | LLAMA | {
            "global_batch_size": 160, "context_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2,
            "num_distributed_optimizer_instances": 2, "recompute_granularity": "selective",
        },
    ),
}  # fmt: skip
SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "fp32": (2, {"bf16": False, "fp32_residual_connection": False}),
    "TP 2 without sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": False}),
    "TP 2 in chunks": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True}),
    "bf16 on the wire, several buckets": (
        8, {"ddp_bucket_size": 50_000, "accumulate_allreduce_grads_in_fp32": False,
            "num_distributed_optimizer_instances": 4},
    ),
    "PP 2": (4, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "gpipe"}),
    "ZB-H1": (4, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zb-h1"}),
    "ZB-V": (
        4, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zb-v", "num_virtual_stages_per_pipeline_rank": 2,
            "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "head shared by the pipeline": (
        8, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
            "pipeline_vocab_parallel": True, "untie_embeddings_and_output_weights": True},
    ),
    "tied head shared by the pipeline": (
        16, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
             "pipeline_vocab_parallel": True, "untie_embeddings_and_output_weights": False, "ddp_bucket_size": 50_000,
             "num_distributed_optimizer_instances": 2},
    ),
    "tied head shared by a pipeline alone, fp32": (
        3, {"pipeline_model_parallel_size": 3, "pipeline_vocab_parallel": True, "bf16": False,
            "untie_embeddings_and_output_weights": False, "make_vocab_size_divisible_by": 1},
    ),
    "tied head shared by the pipeline, Muon, CP 2": (
        8, {"pipeline_model_parallel_size": 4, "pipeline_vocab_parallel": True, "context_parallel_size": 2,
            "untie_embeddings_and_output_weights": False, "optimizer": "muon", "loss_backend": "triton",
            "accumulate_allreduce_grads_in_fp32": False},
    ),
    "head shared by a pipeline of one": (
        4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_vocab_parallel": True,
            "untie_embeddings_and_output_weights": True},
    ),
    "CP 2": (4, {"context_parallel_size": 2}),
    "plain loss": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "loss_backend": "triton"}),
    "all redone": (
        4, {"recompute_granularity": "full", "recompute_num_layers": 2, "tensor_model_parallel_size": 2,
            "context_parallel_size": 2, "sequence_parallel": True},
    ),
    "first block redone": (2, {"recompute_granularity": "full", "recompute_method": "block"}),
    "redone from host memory": (2, {"recompute_granularity": "full", "cpu_offloading": True}),
    "Muon": (8, {"optimizer": "muon", "tensor_model_parallel_size": 2, "ddp_bucket_size": 200_000}),
    "Muon, PP 2": (2, {"optimizer": "muon", "pipeline_model_parallel_size": 2}),
    "more ranks than key/value heads": (
        12, {"tensor_model_parallel_size": 6, "sequence_parallel": True, "num_attention_heads": 12,
             "num_query_groups": 3, "seq_length": 24, "ffn_hidden_size": 204, "global_batch_size": 12},
    ),
    "Muon, more ranks than key/value heads": (
        24, {"optimizer": "muon", "tensor_model_parallel_size": 6, "sequence_parallel": True, "num_attention_heads": 12,
             "num_query_groups": 3, "seq_length": 24, "ffn_hidden_size": 204},
    ),
    "fp16": (4, {"bf16": False, "fp16": True, "fp32_residual_connection": True, "pipeline_model_parallel_size": 2}),
    "norms redone": (2, {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}),
}  # fmt: skip


def by_group(traffic: Traffic, mesh: Mesh) -> dict[tuple[str, str], Calls]:
    """Traffic by the names that Collectives uses, which knows groups and not the axes that share them."""
    names = name_groups(mesh)
    name_of = {axis.name: names[axis.group] for axis in mesh.axes if axis.group is not None}
    return total(*({(name_of[axis], kind): calls} for (axis, kind), calls in traffic.items()))


def assert_as_planned(run: Run, seat: Seat) -> None:
    """Parameters, state, collectives and activations of a rank are what the closed forms say."""
    buffers, adam = run.buffers, run.optimizer
    state = state_bytes(seat)
    parameters = {id(s.parameter): s.parameter.numel() for s in buffers.segments}
    assert num_parameters(seat) == sum(parameters.values())
    assert state.parameters == buffers.params.nbytes
    assert state.gradients == buffers.grads.nbytes
    assert state.shard_gradients == (0 if buffers.owned_grads is buffers.grads else buffers.owned_grads.nbytes)
    kept = [adam.exp_avg.flat, adam.exp_avg_sq.flat, adam.momentum.flat]
    kept += [adam.master] if adam.master is not buffers.params else []
    assert state.optimizer == sum(x.nbytes for x in kept)
    copy = run.head.tied.copy if run.head is not None and run.head.tied is not None else None
    assert state.word_copy == (0 if copy is None else copy.rows.nbytes + copy.gradient.nbytes)

    static = [buffers.params, *(x for chunk in run.chunks for x in chunk.table or ())]
    with Kept(static) as graphs, Collectives(run.mesh) as collectives:
        train_step(run, 1)
    assert collectives.traffic == by_group(step_traffic(seat, len(run.cfg.data.sources)), run.mesh)
    assert graphs.now == 0, "something is kept beyond the step"
    assert abs(activation_bytes(seat) - graphs.most) <= 0.02 * graphs.most, activation_bytes(seat) / graphs.most


def configured(preset: str, world: int, flags: dict[str, Any]) -> Config:
    cfg = resolve(load_config(preset, {"bf16": True} | flags), has_cuda=True)
    check(cfg, world)
    return cfg


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("case", LARGE)
def test_a_rank_of_a_large_world_does_what_the_closed_forms_say(case: str, place: str) -> None:
    world, flags = LARGE[case]
    cfg = configured("polylm-13b", world, flags)
    rank = {"first": 0, "middle": world // 2 + 13, "last": world - 1}[place]
    with fake_run(cfg, 256_000, world, rank) as run:
        assert_as_planned(run, Seat(cfg, 256_000, tuple(layer_split(cfg, 256_000)), world, rank))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", SMALL)
def test_every_option_is_in_the_closed_forms(case: str, family: str) -> None:
    world, flags = SMALL[case]
    cfg = configured("tiny", world, FAMILIES[family] | {"global_batch_size": 16} | flags)
    for rank in (0, world - 1):
        with fake_run(cfg, VOCAB, world, rank) as run:
            assert_as_planned(run, Seat(cfg, VOCAB, tuple(layer_split(cfg, VOCAB)), world, rank))
