"""Dropout of the branches and the embedding, the same on every layout and after every resume."""

from dataclasses import dataclass

from megapoly_kernels import dropout
from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """What is dropped of this rank's tokens: `token_t`, int64 [tokens of this rank], are their numbers in the run."""

    rate: float
    seed: int
    token_t: Tensor

    def __call__(self, x_tH: Tensor, place: int) -> Tensor:
        """Drop entries of [tokens of this rank, hidden]; each dropout of the model has a `place` of its own."""
        dropped_tH: Tensor = dropout(x_tH, self.token_t, self.rate, self.seed, place)
        return dropped_tH
