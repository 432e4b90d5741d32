"""Recomputation changes what is kept, not what is computed: gradients are equal bit for bit on every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import FAMILIES, keep_first_gradients, tiny_config, tiny_run
from torch import Tensor

from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.step import evaluate, train_step

MODES: dict[str, dict[str, Any]] = {
    "uniform": {"recompute_granularity": "full"},
    "uniform by twos": {"recompute_granularity": "full", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective"},
    "offloaded": {"recompute_granularity": "full", "cpu_offloading": True},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2 zb": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zb-h1"},
    "dp2": {},
}
CELLS = [(family, layout) for family in FAMILIES for layout in ("one", "tp2 sp", "pp2")]


def trained(mesh: Mesh, cfgs: dict[str, Config]) -> dict[str, dict[str, Tensor]]:
    """By mode: whole gradients of the first step, parameters after the second, held-out losses."""
    results = {}
    for mode, cfg in cfgs.items():
        run = tiny_run(mesh, cfg)
        seen = keep_first_gradients(run)
        for step in (1, 2):
            train_step(run, step)
        run.buffers.wait_params()
        results[mode] = seen | {"parameters": run.buffers.params.clone(), "held out": evaluate(run)}
    return results


@pytest.mark.parametrize(("family", "layout"), [*CELLS, ("gpt2", "pp2 zb"), ("llama", "dp2")])
def test_every_mode_gives_the_bits_of_none(family: str, layout: str, tmp_path: Path) -> None:
    axes, modes = LAYOUTS[layout], {"none": {}} | MODES
    cfgs = {mode: tiny_config(tmp_path, family, 2, num_layers=5, **axes, **leaves) for mode, leaves in modes.items()}
    sizes = {axis: 2 if layout.startswith(axis) else 1 for axis in ("tp", "pp", "dp")}
    for of_rank in run_ranks(trained, cfgs, **sizes):
        expected = of_rank.pop("none")
        assert any(name.endswith("qkv.weight") for name in expected)
        for mode, results in of_rank.items():
            assert results.keys() == expected.keys()
            for name, value in results.items():
                assert torch.equal(value, expected[name]), f"{mode}: {name}"
