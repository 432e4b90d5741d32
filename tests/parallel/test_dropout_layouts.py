"""What is dropped depends on seed, token, place in the model and channel alone: layouts train alike with dropout too."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_parity import assert_same_training, steps_of
from tiny_runs import tiny_config, tiny_run

from megapoly.checks import check
from megapoly.errors import ConfigError
from megapoly.model.dropout import Dropout
from megapoly.parallel.mesh import single_process_mesh
from megapoly.train.step import evaluate, train_step

STEPS = 6
RATE = {"hidden_dropout": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@functools.cache
def alone(family: str, folder: Path, is_apart: bool) -> dict[str, Any]:
    cfg = tiny_config(folder, family, STEPS, reset_attention_mask=is_apart, **RATE)
    return run_ranks(steps_of, cfg, STEPS)[0]


@pytest.mark.parametrize(
    ("family", "axes", "options"),
    [
        ("gpt2", {"tp": 2, "pp": 2, "dp": 2}, {"sequence_parallel": True, "pipeline_schedule": "zb-v"}),
        ("gpt2", {"cp": 2, "tp": 2}, {"sequence_parallel": True, "micro_batch_size": 2}),
        ("llama", {"cp": 2, "dp": 2}, {"recompute_granularity": "full"}),
        ("llama", {"cp": 2, "dp": 2}, {"reset_attention_mask": True, "micro_batch_size": 2}),
        ("llama", {"tp": 2}, {"recompute_granularity": "selective"}),
        ("gpt_neox", {"tp": 2, "dp": 2}, {"micro_batch_size": 2}),
        ("gpt_neox", {"pp": 2}, {"recompute_granularity": "full", "pipeline_schedule": "interleaved"}),
    ],
)
def test_layouts_drop_the_same(family: str, axes: dict[str, int], options: dict[str, Any], folder: Path) -> None:
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size"}
    sizes = {names[axis]: size for axis, size in axes.items() if axis in names}
    if options.get("pipeline_schedule") == "interleaved":
        sizes["num_virtual_stages_per_pipeline_rank"] = 2
    cfg = tiny_config(folder, family, STEPS, **sizes, **options, **RATE)
    for of_rank in run_ranks(steps_of, cfg, STEPS, **axes):
        assert_same_training(of_rank, alone(family, folder, cfg.data.reset_attention_mask))


@pytest.mark.parametrize("is_apart", [False, True])
def test_training_drops_and_evaluation_does_not(is_apart: bool, folder: Path) -> None:
    """The first held-out loss is that of the initial weights, whatever the rate; the first training loss is not."""
    found = []
    for rate in (0.0, 0.2, 0.5):
        cfg = tiny_config(folder, "gpt2", STEPS, hidden_dropout=rate, reset_attention_mask=is_apart)
        run = tiny_run(single_process_mesh(), cfg)
        held_out = evaluate(run).tolist()
        found.append((held_out, steps_of(single_process_mesh(), cfg, 1)["losses"]))
    assert found[0][0] == found[1][0] == found[2][0]
    assert len({losses[0] for _, losses in found}) == 3


@pytest.mark.parametrize("is_apart", [False, True])
def test_tokens_are_told_apart_by_their_numbers_in_the_run(is_apart: bool, folder: Path) -> None:
    """Whichever rank and micro-batch reads them: the sequences of a step are those of its samples, each once."""
    cfg = tiny_config(folder, "gpt2", STEPS, micro_batch_size=2, reset_attention_mask=is_apart)
    run = tiny_run(single_process_mesh(), cfg)
    length = run.prepared.plan.block_length
    for first in (0, 8, 24):
        begins = [batch.begins for batch in run.loader.batch(first, first + 8)]
        assert all(begin is not None and begin.shape == (2,) for begin in begins)
        assert sorted(np.concatenate(begins).tolist()) == [length * n for n in range(first, first + 8)]


def test_masks_of_places_tokens_and_seeds_differ(folder: Path) -> None:
    """All dropouts of a model are tried: no two have a mask in common, and no two tokens of one."""
    seen: list[torch.Tensor] = []
    for seed in (1, 2):
        run = tiny_run(single_process_mesh(), tiny_config(folder, "gpt2", STEPS, seed=seed, **RATE))
        model = run.chunks[0]
        drop = model._dropout(torch.tensor([0, 2**33]), 8)
        places = range(2 * model.m.num_layers + 1)
        seen += [(drop(torch.ones(16, 256), place) > 0) for place in places]
    rows = torch.cat(seen).int()
    assert torch.unique(rows, dim=0).shape == rows.shape
    assert rows.float().mean().item() == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_dropout": 1.0}, r"hidden_dropout \(1.0\) must lie in \[0, 1\)"),
        ({"hidden_dropout": -0.1}, r"hidden_dropout \(-0.1\) must lie in \[0, 1\)"),
        ({"attention_dropout": 0.1}, r"attention_dropout \(0.1\) must be 0: "),
    ],
)
def test_rates_that_cannot_be_are_refused(options: dict[str, float], reason: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(tiny_config(folder, "gpt2", STEPS, **options), 1)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_each_dropout_of_the_model_has_its_own_place(
    family: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(single_process_mesh(), tiny_config(folder, family, STEPS, micro_batch_size=8, **RATE))
    places: list[int] = []
    drop = Dropout.__call__
    monkeypatch.setattr(Dropout, "__call__", lambda self, x, place: (places.append(place), drop(self, x, place))[1])
    train_step(run, 1)
    assert sorted(places) == list(range(2 * run.cfg.model.num_layers + 1))
