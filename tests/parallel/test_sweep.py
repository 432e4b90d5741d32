"""Every option of the engine beside every other: layouts that cover all pairs train like one process.

`make test-parity` covers all triples on up to 16 ranks.
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from covering import Row, covering, parts_of
from ranks import run_ranks
from test_parity import assert_same_training, steps_of
from tiny_runs import FAMILIES, tiny_config

from megapoly.checks import check
from megapoly.errors import ConfigError
from megapoly.parallel.mesh import Layout
from megapoly.sections import Config

STEPS = 4
MODEL = {"num_layers": 6, "num_attention_heads": 8, "num_query_groups": 2, "hidden_size": 128, "ffn_hidden_size": 208}
TP, CP, PP = "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"
CHUNKS = "num_virtual_stages_per_pipeline_rank"
REDONE, BUCKETS = "recompute_granularity", "ddp_bucket_size"
INSTANCES = "num_distributed_optimizer_instances"

# What changes the training itself, and so has a reference of its own ..
TRAININGS: dict[str, list[dict[str, Any]]] = {
    "optimizer": [{}, {"optimizer": "muon"}],
    "parametrization": [{}, {"use_mup": True, "mup_base_hidden_size": 64, "no_weight_decay_embeddings": True}],
}
# .. and what must not change it.
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "tensor": [
        {},
        {TP: 2},
        {TP: 2, "sequence_parallel": True},
        {TP: 4, "sequence_parallel": True, "tp_comm_overlap": True},
    ],
    "context": [{}, {CP: 2}, {CP: 4}],
    "pipeline": [
        {},
        {PP: 2, "pipeline_schedule": "gpipe"},
        {PP: 4},
        {PP: 2, CHUNKS: 2},
        {PP: 2, CHUNKS: 3, "pipeline_layer_split": [0, 2, 1, 1, 2, 0]},
        {PP: 4, "pipeline_schedule": "zb-h1"},
        {PP: 2, "pipeline_schedule": "zb-v"},
        {PP: 2, "pipeline_vocab_parallel": True},
    ],
    "data": [
        {"dp": 1},
        {"dp": 2, BUCKETS: 20_000},
        {"dp": 2, INSTANCES: 2, "overlap_param_gather": False},
        {"dp": 4, INSTANCES: 2, "overlap_grad_reduce": False},
    ],
    "recompute": [
        {},
        {REDONE: "selective"},
        {REDONE: "full", "recompute_num_layers": 2},
        {REDONE: "full", "recompute_method": "block", "cpu_offloading": True},
    ],
    "loss": [{"loss_backend": "torch"}, {"loss_backend": "fused_linear"}],
    "micro_batch": [{"micro_batch_size": 1}, {"micro_batch_size": 3}],
}
FACTORS: dict[str, list[Any]] = {"family": list(FAMILIES), **TRAININGS, **LAYOUTS}


def leaves_of(row: Row, factors: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    leaves = dict(itertools.chain.from_iterable(values[row[name]].items() for name, values in factors.items()))
    return leaves | MODEL | {"global_batch_size": 12}


def layout_of(row: Row, folder: Path) -> tuple[Config, Layout, int]:
    """The row's configuration, its layout and its data-parallel size."""
    leaves = leaves_of(row, TRAININGS | LAYOUTS)
    dp = leaves.pop("dp")
    cfg = tiny_config(folder, FACTORS["family"][row["family"]], 6, **leaves)
    return cfg, Layout.of(cfg), dp


def rows_of(folder: Path, ranks: int, strength: int) -> list[Row]:
    @functools.cache
    def refuses(key: tuple[tuple[str, int], ...]) -> bool:
        cfg, layout, dp = layout_of(dict(key), folder)
        try:
            check(cfg, layout.model * dp)
        except ConfigError:
            return True
        return False

    def is_possible(row: Row) -> bool:
        sizes = (FACTORS[name][row[name]] for name in ("tensor", "context", "pipeline", "data"))
        world = math.prod(size.get(key, 1) for size, key in zip(sizes, (TP, CP, PP, "dp"), strict=True))
        return world <= ranks and not refuses(tuple(row.items()))

    return covering(FACTORS, is_possible, strength)


@functools.cache
def reference(family: int, optimizer: int, parametrization: int, folder: Path) -> dict[str, Any]:
    row = {"family": family, "optimizer": optimizer, "parametrization": parametrization}
    cfg = tiny_config(folder, FACTORS["family"][family], 6, **leaves_of(row, TRAININGS))
    return run_ranks(steps_of, cfg, STEPS)[0]


def train_all(rows: list[Row], folder: Path) -> None:
    for number, row in enumerate(rows):
        cfg, layout, dp = layout_of(row, folder)
        options = leaves_of(row, TRAININGS | LAYOUTS)
        print(f"{number + 1}/{len(rows)} {FACTORS['family'][row['family']]} {options}", flush=True)
        expected = reference(row["family"], row["optimizer"], row["parametrization"], folder)
        for of_rank in run_ranks(steps_of, cfg, STEPS, **dataclasses.asdict(layout), dp=dp):
            assert_same_training(of_rank, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.timeout(1800)
def test_all_pairs_of_options_on_eight_ranks_train_like_one_process(folder: Path) -> None:
    train_all(rows_of(folder, ranks=8, strength=2), folder)


@pytest.mark.sweep
@pytest.mark.timeout(6 * 3600)
def test_all_triples_of_options_on_sixteen_ranks_train_like_one_process(folder: Path) -> None:
    train_all(rows_of(folder, ranks=16, strength=3), folder)


def test_a_covering_array_has_all_that_is_possible() -> None:
    factors = {"a": range(4), "b": range(3), "c": range(3), "d": range(2)}

    def is_possible(row: Row) -> bool:
        return not (row["a"] == 3 and row["b"] == 1) and row["c"] + row["d"] < 3

    everything = [dict(zip(factors, numbers, strict=True)) for numbers in itertools.product(*factors.values())]
    for strength in (2, 3):
        rows = covering(factors, is_possible, strength)
        assert all(map(is_possible, rows))
        wanted = {part for row in filter(is_possible, everything) for part in parts_of(row, strength)}
        assert {part for row in rows for part in parts_of(row, strength)} == wanted
        assert len(rows) < len(list(filter(is_possible, everything)))
        assert rows == covering(factors, is_possible, strength)
