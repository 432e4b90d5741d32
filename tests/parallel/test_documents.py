"""Documents packed into one sequence: what is reset between them, as if each had been read alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megapoly_kernels import choose
from ranks import run_ranks
from test_parity import assert_same_training, steps_of
from tiny_runs import FAMILIES, model_config, tiny_config
from torch import Tensor

from megapoly.model.init import initialize
from megapoly.model.transformer import Transformer
from megapoly.parallel.mesh import Axis
from megapoly.parallel.stage import Stage
from megapoly.parallel.tensor import Placement
from megapoly.sections import Config, DataConfig, TrainConfig

CPU = torch.device("cpu")
PLACE = Placement(Axis("tp"), sequence_parallel=False, dtype=torch.float32, device=CPU)
LENGTHS = (3, 1, 9, 7, 12)  # of documents in two rows of 16: the third runs into the end of the first row
ROWS = ((3, 1, 9, 3), (4, 12))
BORDERS = torch.tensor([0, 3, 4, 13, 16, 20, 32], dtype=torch.int32)
STEPS = 6


def whole_model(family: str, mask: bool = False, positions: bool = False, **train: Any) -> Transformer:
    cfg = Config(
        model=model_config(family), data=DataConfig(reset_attention_mask=mask, reset_position_ids=positions),
        train=TrainConfig(**train),
    )  # fmt: skip
    model = Transformer(cfg, 211, Stage(0, 3, has_embedding=True, has_head=True), PLACE, choose({}, CPU))
    initialize(model, seed=3)
    return model


def tokens() -> Tensor:
    return torch.randint(0, 211, (2, 16), generator=torch.Generator().manual_seed(5))


def read_alone(family: str, tokens_BS: Tensor, rows: Sequence[Sequence[int]] = ROWS) -> Tensor:
    """What the plain model makes of each document by itself."""
    model, found = whole_model(family), []
    for row, lengths in zip(tokens_BS, rows, strict=True):
        found += [model(document[None]) for document in row.split(list(lengths))]
    return torch.cat(found)


@pytest.mark.parametrize("redone", [{}, {"recompute_granularity": "selective"}, {"recompute_granularity": "full"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_apart_are_read_as_if_alone(family: str, redone: dict[str, Any]) -> None:
    made = whole_model(family, mask=True, positions=True, **redone)(tokens(), None, BORDERS)
    torch.testing.assert_close(made, read_alone(family, tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_switch_resets_its_own(family: str) -> None:
    def made(mask: bool, positions: bool) -> Tensor:
        result: Tensor = whole_model(family, mask, positions)(tokens(), None, BORDERS)
        return result

    plain, alone = whole_model(family)(tokens()), read_alone(family, tokens())
    assert torch.equal(made(False, False), plain)
    # Rotary attention sees distances only: apart, documents do not know where they lie.
    is_learned = family == "gpt2"
    assert torch.allclose(made(True, False), alone, atol=1e-5) != is_learned
    for other in (plain, alone):
        assert not torch.allclose(made(False, True), other, atol=1e-2)
    assert not torch.allclose(made(True, False), plain, atol=1e-2)
    first = slice(0, 3)  # where nothing lies before
    assert torch.allclose(made(False, True)[first], plain[first], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_crosses_a_border(family: str) -> None:
    model = whole_model(family, mask=True)
    ids = torch.arange(32).view(2, 16)  # every token of its own, so that the rows of the embedding tell them apart
    model(ids, None, BORDERS)[4:13].square().sum().backward()
    reached = model.embedding["word"].weight.grad[:32].abs().sum(1).nonzero().flatten().tolist()
    assert reached == list(range(4, 13))


@pytest.mark.parametrize(
    ("family", "axes", "options"),
    [
        ("gpt2", {"tp": 2, "cp": 2}, {"sequence_parallel": True, "reset_position_ids": True}),
        ("gpt_neox", {"dp": 2, "cp": 2}, {"micro_batch_size": 2, "eod_mask_loss": True}),
        (
            "llama",
            {"pp": 2},
            {"pipeline_schedule": "zb-h1", "recompute_granularity": "selective", "eod_mask_loss": True},
        ),
        ("gpt2", {"cp": 2, "pp": 2}, {"recompute_granularity": "full"}),
    ],
)
def test_every_layout_keeps_documents_apart(
    family: str, axes: dict[str, int], options: dict[str, Any], tmp_path: Path
) -> None:
    of_loss = {name: value for name, value in options.items() if name in ("eod_mask_loss", "reset_position_ids")}
    alone = run_ranks(steps_of, tiny_config(tmp_path, family, STEPS, reset_attention_mask=True, **of_loss), STEPS)[0]
    names = {"tp": "tensor_model_parallel_size", "cp": "context_parallel_size", "pp": "pipeline_model_parallel_size"}
    layout = {names[axis]: size for axis, size in axes.items() if axis != "dp"}
    cfg = tiny_config(tmp_path, family, STEPS, reset_attention_mask=True, **layout, **options)
    for of_rank in run_ranks(steps_of, cfg, STEPS, **axes):
        assert_same_training(of_rank, alone)
    plain = run_ranks(steps_of, tiny_config(tmp_path, family, STEPS), STEPS)[0]
    assert plain["losses"] != pytest.approx(alone["losses"], rel=1e-5)


def test_held_out_documents_are_apart_too(tmp_path: Path) -> None:
    switches: list[dict[str, bool]] = [{}, {"reset_attention_mask": True}, {"eod_mask_loss": True}]
    seen = [run_ranks(steps_of, tiny_config(tmp_path, "llama", 2, **switch), 0)[0] for switch in switches]
    plain, apart, masked = (result["held_out"] for result in seen)
    assert plain != pytest.approx(apart, rel=1e-5) and plain != pytest.approx(masked, rel=1e-5)
    assert sum(seen[2]["held_out_tokens"]) < sum(seen[1]["held_out_tokens"]) == sum(seen[0]["held_out_tokens"])
