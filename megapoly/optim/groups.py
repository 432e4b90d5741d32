"""Which rule updates which parameter: its weight decay, the factor of its learning rate, Muon or AdamW."""

import math
from dataclasses import dataclass

from megapoly.sections import ModelConfig, OptimizerConfig


def is_hidden_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix of a block: what maps the width of the model to a width.

    Embeddings and the head have one side that is not a width; biases and norms (qkv and gated biases have several
    dimensions) are vectors.
    """
    return name.startswith("layers.") and name.endswith(".weight") and len(shape) > 1


@dataclass(frozen=True)
class Rules:
    """How the configuration treats a parameter, by its name and shape alone, so that no layout changes it."""

    optimizer: OptimizerConfig
    model: ModelConfig

    def uses_muon(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether Muon updates it; AdamW does else."""
        return self.optimizer.optimizer == "muon" and is_hidden_matrix(name, shape)

    def weight_decay(self, name: str, shape: tuple[int, ...]) -> float:
        """Decoupled decay: none for biases and norms, nor for embeddings where they are left out of it."""
        is_spared = self.optimizer.no_weight_decay_embeddings and name.startswith("embedding.")
        return 0.0 if name.endswith("bias") or len(shape) < 2 or is_spared else self.optimizer.weight_decay

    def lr_scale(self, name: str, shape: tuple[int, ...]) -> float:
        """What multiplies the learning rate: 1 but for the blocks' matrices of a model in muP of width multiple m.

        With AdamW 1/m (Yang et al. 2022, arXiv 2203.03466, table 8). An update of Muon has the spectral norm
        muon_scale x sqrt(larger side), which grows as sqrt(m), and the weights' own stays: 1/sqrt(m) keeps their
        ratio (the spectral condition of Yang, Simon and Bernstein 2023, arXiv 2310.17813).
        """
        if not is_hidden_matrix(name, shape):
            return 1.0
        m = self.model.width_multiple
        return 1.0 / math.sqrt(m) if self.uses_muon(name, shape) else 1.0 / m
