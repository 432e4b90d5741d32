"""The dropout kernel drops what its reference drops, forward and backward."""

import pytest
import torch
from comparison import DTYPES, random
from megapoly_kernels import dropout

TOKENS = 2**40 + 5  # of the first token: its number has more than 32 bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 272), (5, 33), (37, 80), (6, 1100), (0, 16)])
def test_outputs_and_gradients_are_those_of_the_reference(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x_tH, dy_tH = (random(tokens, hidden, seed=seed, dtype=dtype) for seed in (1, 2))
    token_t = TOKENS + 3 * torch.arange(tokens)
    results = []
    for backend in ("triton", "torch"):
        leaf_tH = x_tH.clone().requires_grad_()
        y_tH = dropout(leaf_tH, token_t, 0.3, 2**33 + 7, 5, backend)
        y_tH.backward(dy_tH)
        results.append((y_tH, leaf_tH.grad))
    (y_tH, dx_tH), (expected_tH, gradient_tH) = results
    assert y_tH.dtype == dtype and torch.equal(y_tH, expected_tH) and torch.equal(dx_tH, gradient_tH)
    assert torch.equal(y_tH == 0, dx_tH == 0) or tokens == 0


def test_rows_may_lie_apart() -> None:
    wide_tH = random(6, 80, seed=3, dtype=torch.float32)
    token_t = torch.arange(6)
    for x_tH in (wide_tH[:, :48], wide_tH[:, ::2], wide_tH[::2].repeat(2, 1)):
        assert torch.equal(dropout(x_tH, token_t, 0.5, 1, 0, "triton"), dropout(x_tH, token_t, 0.5, 1, 0, "torch"))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_any_seed_and_place(seed: int) -> None:
    x_tH, token_t = torch.ones(3, 20), torch.arange(3)
    for place in (0, 1, 16, 2**31 - 1):
        kept_tH = dropout(x_tH, token_t, 0.5, seed, place, "triton")
        assert torch.equal(kept_tH, dropout(x_tH, token_t, 0.5, seed, place, "torch"))
