"""Initial weights do not know the layout: a shard of a draw is the draw of the shard."""

import pytest
import torch

from megapoly.parallel.rng import key, normal_shard


def whole_draw(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
    return normal_shard(shape, std, seed, name, (0,) * len(shape), shape)


@pytest.mark.parametrize(
    ("shape", "dim"), [((1003, 24), 0), ((24, 1003), 1), ((2, 300, 7), 1), ((9000, 3), 0), ((5,), 0)]
)
def test_shards_are_slices_of_the_whole(shape: tuple[int, ...], dim: int) -> None:
    whole = whole_draw(shape, 0.5, 1, "x")
    assert whole.shape == shape
    for begin, end in ((0, shape[dim] // 2), (shape[dim] // 2, shape[dim]), (1, 1), (3, 5)):
        part = whole.narrow(dim, begin, end - begin)
        offsets = tuple(begin if d == dim else 0 for d in range(len(shape)))
        assert torch.equal(normal_shard(shape, 0.5, 1, "x", offsets, tuple(part.shape)), part)


def test_draws_are_normal_and_depend_on_seed_and_name() -> None:
    a = whole_draw((500, 400), 0.02, 1, "a")
    assert a.mean().abs() < 5 * 0.02 / 200_000**0.5
    assert a.std().item() == pytest.approx(0.02, rel=0.01)
    assert (a.abs() > 3 * 0.02).double().mean().item() == pytest.approx(0.0027, rel=0.15)
    for other in (
        whole_draw((500, 400), 0.02, 2, "a"),
        whole_draw((500, 400), 0.02, 1, "b"),
    ):
        assert torch.corrcoef(torch.stack([a.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_blocks_of_rows_are_independent() -> None:
    x = whole_draw((3 * 4096, 2), 1.0, 1, "a")
    assert not torch.equal(x[:4096], x[4096:8192])


def test_keys_do_not_depend_on_the_process() -> None:
    # A literal value: a salted hash would pass any comparison within one process.
    assert key(1, "x", 0) == key(1, "x", 0) != key(1, "x", 1)
    assert key("megapoly") == 3924610503893897384
