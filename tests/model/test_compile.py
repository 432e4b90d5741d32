"""A compiled block trains as it does uncompiled, alone and with collectives inside."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import keep_first_gradients, tiny_config, tiny_run

from megapoly.checks import check
from megapoly.errors import ConfigError
from megapoly.parallel.mesh import Mesh
from megapoly.sections import Config
from megapoly.train.step import train_step


def trained(mesh: Mesh, cfg: Config) -> dict[str, Any]:
    """Losses of two steps, gradients of the first, graphs captured and breaks between them."""
    run = tiny_run(mesh, cfg)
    gradients = keep_first_gradients(run)
    sums = [train_step(run, step).by_source.sum(1) for step in (1, 2)]
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    return {
        "losses": [(total / count).item() for total, count in sums],
        "gradients": gradients,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": breaks,
    }


ALONE = {"num_layers": 2, "recompute_granularity": "full", "recompute_method": "block"}
TOGETHER = {"num_layers": 1, "tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize("leaves", [ALONE, TOGETHER], ids=["alone", "tp2"])
def test_compiled_blocks_train_as_before(
    leaves: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The default backend writes C++ for minutes; what it is given to compile is the same.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tp = leaves.get("tensor_model_parallel_size", 1)
    eager = run_ranks(trained, tiny_config(tmp_path, "gpt2", 2, **leaves), tp=tp)[0]
    compiled = run_ranks(trained, tiny_config(tmp_path, "gpt2", 2, torch_compile=True, **leaves), tp=tp)[0]
    assert eager["graphs"] == 0 and compiled["graphs"] > 0
    if tp == 1:
        assert compiled["breaks"] == 0
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    whole = torch.stack([gradient.norm() for gradient in eager["gradients"].values()]).norm()
    for name, gradient in eager["gradients"].items():
        error = (compiled["gradients"][name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7 * whole, name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("recompute_granularity", "selective"),
        ("fp8_recipe", "tensorwise"),
        ("context_parallel_size", 2),
        ("pipeline_schedule", "zb-h1"),
    ],
)
def test_what_a_captured_block_would_leave_out_is_refused(option: str, value: Any, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", torch_compile=True, **{option: value})
    with pytest.raises(ConfigError, match=f"torch_compile does not go with {option} {value}"):
        check(cfg, 2)
