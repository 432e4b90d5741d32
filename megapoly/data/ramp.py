"""A share that moves over a stage, as a staircase of constant shares: the sampler's guarantee then holds as it is.

All of it is rational arithmetic, no library's sine: every host has the same staircase.
"""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from megapoly.config import nearest
from megapoly.data.sources import decimal
from megapoly.errors import ConfigError

SHAPES = ("linear", "cosine", "steps")
KEYS = ("from", "to", "shape", "steps")
DEFAULT_STEPS = 100
DIGITS = 10**18  # the mean of a cosine is rounded to so many parts
PI = Fraction(3141592653589793238462643383279502884197, 10**39)


@dataclass(frozen=True)
class Ramp:
    """From `begin` to `end` over a stage: straight, as half a cosine, or in `steps` equal steps of both ends included.

    `steps` may be given for the other shapes too: the steps of their staircase, else as many as change a sample, at
    most 100.
    """

    begin: Fraction
    end: Fraction
    shape: str = "linear"
    steps: int | None = None

    @classmethod
    def of(cls, tree: dict[str, Any], where: str) -> Self:
        """From {from, to, shape, steps}; ConfigError names the key that is wrong."""
        for key in tree:
            if key not in KEYS:
                raise ConfigError(f"{where}: unknown key '{key}'; {nearest(str(key), list(KEYS))}")
        for key in ("from", "to"):
            if key not in tree:
                raise ConfigError(f"{where}: '{key}' is missing; a ramp is {{from: 0.3, to: 0.6}}")
            value = tree[key]
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ConfigError(f"{where}: '{key}' must be a number, not {value!r}; a ramp is {{from: 0.3, to: 0.6}}")
        shape, steps = tree.get("shape", "linear"), tree.get("steps")
        if shape not in SHAPES:
            raise ConfigError(f"{where}: shape '{shape}' is unknown; {nearest(str(shape), list(SHAPES))}")
        if steps is None and shape == "steps":
            raise ConfigError(f"{where}: shape steps needs 'steps', their number, such as steps: 4")
        if steps is not None and (steps != steps // 1 if isinstance(steps, (int, float)) else True):
            raise ConfigError(f"{where}: steps ({steps}) must be a whole number")
        if steps is not None and (isinstance(steps, bool) or not 1 + (shape == "steps") <= steps <= 10_000):
            raise ConfigError(f"{where}: steps ({steps}) must lie between {1 + (shape == 'steps')} and 10,000")
        begin, end = (decimal(float(tree[key]), f"{where}: {key}", most=1) for key in ("from", "to"))
        return cls(begin, end, shape, None if steps is None else int(steps))

    def staircase(self, samples: int) -> list[tuple[int, Fraction]]:
        """(samples, share) of each step of a stage of so many samples; each share is the ramp's mean over its step."""
        steps = min(self.steps or self._steps_of(samples), samples)
        borders = [samples * i // steps for i in range(steps + 1)]
        pieces = []
        for i, (first, last) in enumerate(itertools.pairwise(borders)):
            part = Fraction(i, max(steps - 1, 1)) if self.shape == "steps" else self._mean(first, last, samples)
            pieces.append((last - first, self.begin + (self.end - self.begin) * part))
        return pieces

    def _steps_of(self, samples: int) -> int:
        """With n steps neighbours differ by |end - begin| / n over samples / n: from there on by less than a sample."""
        return min(DEFAULT_STEPS, max(math.isqrt(int(samples * abs(self.end - self.begin))), 1))

    def _mean(self, first: int, last: int, samples: int) -> Fraction:
        """Mean over samples first to last of the part of the way that is done: x, or (1 - cos(pi x)) / 2."""
        a, b = Fraction(first, samples), Fraction(last, samples)
        if self.shape == "linear":
            return (a + b) / 2
        mean = Fraction(1, 2) - (_sin_pi(b) - _sin_pi(a)) / (2 * PI * (b - a))
        return Fraction(round(mean * DIGITS), DIGITS)


def _sin_pi(x: Fraction) -> Fraction:
    """sin(pi x) for x in [0, 1] within 10^-30, by Taylor's series about the nearer end."""
    angle = Fraction(round(PI * min(x, 1 - x) * 10**36), 10**36)
    term = total = angle
    for n in range(2, 34, 2):
        term = Fraction(round(-term * angle * angle / (n * (n + 1)) * 10**36), 10**36)
        total += term
    return total
