"""Which rule updates which parameter."""

from collections.abc import Callable

import pytest
from tiny_runs import FAMILIES, VOCAB, model_config

from megapoly.checks import check_model
from megapoly.errors import ConfigError
from megapoly.model.count import parameter_shapes
from megapoly.optim.groups import Rules
from megapoly.sections import ModelConfig, OptimizerConfig

HIDDEN = {f"layers.{i}.{name}.weight" for i in range(3) for name in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")}  # fmt: skip
EMBEDDINGS = {"embedding.word.weight", "embedding.position.weight"}


def chosen(m: ModelConfig, rule: Callable[[str, tuple[int, ...]], object]) -> set[str]:
    return {name for name, shape in parameter_shapes(m, VOCAB) if rule(name, shape)}


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_decay_and_embeddings_may_be_left_out(family: str) -> None:
    m = model_config(family)
    ends = {"embedding.word.weight"} | ({"embedding.position.weight"} if family == "gpt2" else {"head.weight"})
    assert chosen(m, Rules(OptimizerConfig(weight_decay=0.1), m).weight_decay) == HIDDEN | ends
    spared = Rules(OptimizerConfig(weight_decay=0.1, no_weight_decay_embeddings=True), m)
    assert chosen(m, spared.weight_decay) == HIDDEN | (ends - EMBEDDINGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_the_matrices_of_the_blocks(family: str) -> None:
    m = model_config(family)
    assert chosen(m, Rules(OptimizerConfig(optimizer="muon"), m).uses_muon) == HIDDEN
    assert not chosen(m, Rules(OptimizerConfig(), m).uses_muon)


@pytest.mark.parametrize(("optimizer", "scale"), [("adam", 0.25), ("muon", 0.5)])
def test_mup_slows_the_matrices_of_the_blocks_alone(optimizer: str, scale: float) -> None:
    m = model_config("gpt2", use_mup=True, mup_base_hidden_size=36)
    rules = Rules(OptimizerConfig(optimizer=optimizer), m)
    assert {name: rules.lr_scale(name, shape) for name, shape in parameter_shapes(m, VOCAB)} == {
        name: scale if name in HIDDEN else 1.0 for name, _ in parameter_shapes(m, VOCAB)
    }
    without = Rules(OptimizerConfig(optimizer=optimizer), model_config("gpt2", mup_base_hidden_size=36))
    assert all(without.lr_scale(name, shape) == 1.0 for name, shape in parameter_shapes(m, VOCAB))


def test_mup_needs_an_init_that_it_can_scale() -> None:
    with pytest.raises(ConfigError, match="needs init_method normal, not xavier_normal"):
        check_model(model_config("gpt2", use_mup=True, init_method="xavier_normal"))
