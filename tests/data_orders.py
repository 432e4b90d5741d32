"""Data orders to test with: slices of each source, stages of (samples, weights), a seed."""

from fractions import Fraction

from hypothesis import strategies as st

from megapoly.data.sampler import Sampler, StageTarget

Recipe = tuple[list[int], list[tuple[int, list[int]]], int]


def sampler_of(recipe: Recipe, native: bool | None = None) -> Sampler:
    """The sampler of a recipe, by the extension, by numpy, or by what there is."""
    slices, stages, seed = recipe
    targets = [StageTarget(n, tuple(Fraction(weight, sum(weights)) for weight in weights)) for n, weights in stages]
    return Sampler(slices, targets, seed, native)


@st.composite
def recipes(
    draw: st.DrawFn, min_stages: int = 1, longest: int = 300, most_slices: int = 40, most_sources: int = 8
) -> Recipe:
    """Up to 5 stages over a few sources, some of weight 0."""
    m = draw(st.integers(1, most_sources))
    weights = st.lists(st.integers(0, 20), min_size=m, max_size=m).filter(any)
    stages = draw(st.lists(st.tuples(st.integers(1, longest), weights), min_size=min_stages, max_size=5))
    slices = draw(st.lists(st.integers(1, most_slices), min_size=m, max_size=m))
    return slices, stages, draw(st.integers(-(2**70), 2**70))
