"""Every pair of values of the parallel options in some training that equals the single process's.

In CI on at most 8 ranks. `make test-parity` takes every three values together, on at most 16.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
from covering import Row, covering
from ranks import run_ranks
from test_parity import assert_same_training, steps_of
from tiny_runs import FAMILIES, tiny_config

from megapoly.checks import check
from megapoly.errors import ConfigError
from megapoly.parallel.mesh import Layout
from megapoly.sections import Config

STEPS = 4
# Four ranks may share the 8 heads, of which 2 have keys and values; 4 layers make up to 6 stages with empty ends.
MODEL = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 208, "num_attention_heads": 8}
PLAIN: dict[str, Any] = {}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "family": {name: PLAIN for name in FAMILIES},
    "update": {
        "adam": PLAIN,
        "muon": {"optimizer": "muon"},
        "muP": {"use_mup": True, "mup_base_hidden_size": 64, "no_weight_decay_embeddings": True},
    },
    "tp": {str(n): {"tensor_model_parallel_size": n} for n in (1, 2, 4)},
    "cp": {str(n): {"context_parallel_size": n} for n in (1, 2, 4)},
    "pp": {str(n): {"pipeline_model_parallel_size": n} for n in (1, 2, 4)},
    "dp": {str(n): PLAIN for n in (1, 2, 4)},
    "schedule": {
        "1f1b": PLAIN,
        "gpipe": {"pipeline_schedule": "gpipe"},
        "2 chunks": {"num_virtual_stages_per_pipeline_rank": 2},
        "3 chunks": {"num_virtual_stages_per_pipeline_rank": 3},
        "zb-h1": {"pipeline_schedule": "zb-h1"},
        "zb-v": {"pipeline_schedule": "zb-v", "num_virtual_stages_per_pipeline_rank": 2},
        "shared head": {"pipeline_vocab_parallel": True},
    },
    "tokens": {
        "whole": PLAIN,
        "scattered": {"sequence_parallel": True},
        "in chunks": {"sequence_parallel": True, "tp_comm_overlap": True},
    },
    "redone": {
        "nothing": PLAIN,
        "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "all parts": {"recompute_granularity": "selective"},
        "two blocks at once": {"recompute_granularity": "full", "recompute_num_layers": 2},
        "the first block": {"recompute_granularity": "full", "recompute_method": "block", "cpu_offloading": True},
    },
    "loss": {
        "fused": PLAIN,
        "of two sequences": {"micro_batch_size": 2},
        "of whole logits": {"loss_backend": "torch"},
    },
    "gradients": {
        "in buckets": {"ddp_bucket_size": 20_000},
        "at the end": {"overlap_grad_reduce": False, "overlap_param_gather": False},
        "in two instances": {"num_distributed_optimizer_instances": 2},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def leaves(row: Row) -> dict[str, Any]:
    return {name: value for option, label in row.items() for name, value in OPTIONS[option][label].items()}


def world_of(row: Row) -> int:
    return math.prod(int(row[axis]) for axis in ("tp", "cp", "pp", "dp"))


@functools.cache
def rows_for(most_ranks: int, strength: int, folder: Path) -> list[Row]:
    plain = {family: tiny_config(folder, family, STEPS, **MODEL) for family in FAMILIES}

    def is_possible(row: Row) -> bool:
        if world_of(row) > most_ranks or (row["tp"] == "1" and row["tokens"] != "whole"):
            return False  # most are, and so need not be asked one by one
        if row["schedule"] == "shared head" and row["pp"] == "1":
            return False  # one rank has nobody to share with
        try:
            check(changed(plain[row["family"]], leaves(row)), world_of(row))
        except ConfigError:
            return False
        return True

    return covering(OPTIONS, is_possible, strength)


def changed(cfg: Config, leaves: dict[str, Any]) -> Config:
    """A configuration with some leaves of other values: what tiny_config gives, without reading anything again."""
    sections = {}
    for field in dataclasses.fields(cfg):
        section = getattr(cfg, field.name)
        mine = {name: value for name, value in leaves.items() if hasattr(section, name)}
        sections[field.name] = dataclasses.replace(section, **mine) if mine else section
    return Config(**sections)


@functools.cache
def reference(family: str, update: str, folder: Path) -> dict[str, Any]:
    return steps_of_layout(tiny_config(folder, family, STEPS, **MODEL, **OPTIONS["update"][update]), 1)[0]


def steps_of_layout(cfg: Config, dp: int) -> list[dict[str, Any]]:
    layout = Layout.of(cfg)
    sizes = {name: getattr(layout, name) for name in ("tp", "cp", "pp", "instances", "shares_vocab", "kv")}
    return run_ranks(steps_of, cfg, STEPS, dp=dp, **sizes)


def assert_all_train_alike(rows: list[Row], folder: Path) -> None:
    failures = []
    for row in rows:
        try:
            cfg = tiny_config(folder, row["family"], STEPS, **MODEL, **leaves(row))
            for of_rank in steps_of_layout(cfg, int(row["dp"])):
                assert_same_training(of_rank, reference(row["family"], row["update"], folder))
        except AssertionError as error:
            failures.append(f"{row}: {str(error).strip()[-1500:]}")
    assert not failures, f"{len(failures)} of {len(rows)}:\n" + "\n\n".join(failures)


def test_every_value_is_in_the_sweep(folder: Path) -> None:
    rows = rows_for(8, 2, folder)
    for option, values in OPTIONS.items():
        assert {row[option] for row in rows} == values.keys(), option


@pytest.mark.parametrize("part", range(8))
def test_every_pair_of_options_trains_like_one_process(part: int, folder: Path) -> None:
    assert_all_train_alike(rows_for(8, 2, folder)[part::8], folder)


@pytest.mark.sweep
@pytest.mark.parametrize("part", range(32))
def test_every_three_options_train_like_one_process(part: int, folder: Path) -> None:
    assert_all_train_alike(rows_for(16, 3, folder)[part::32], folder)
