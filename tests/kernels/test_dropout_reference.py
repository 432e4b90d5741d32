"""Dropout's reference: the random numbers are Philox's, as many are dropped as asked for, the mean stays."""

import pytest
import torch
from megapoly_kernels.dropout import dropout_reference, philox

# The paper's own vectors for Philox 4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_random_numbers_are_those_of_the_paper(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(word.item() for word in philox((c0, c1, c2, c3), key)) == words


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for(rate: float) -> None:
    x_tH = torch.ones(1000, 1000)
    y_tH = dropout_reference(x_tH, torch.arange(1000), rate, 3, 4)
    spread = 4 * (rate * (1 - rate) / y_tH.numel()) ** 0.5
    assert (y_tH == 0).float().mean().item() == pytest.approx(rate, abs=spread)
    kept = y_tH[y_tH > 0]
    assert torch.equal(kept, torch.full_like(kept, 1 / (1 - rate)))
    for of_one in ((y_tH == 0).float().mean(0), (y_tH == 0).float().mean(1)):  # no channel and no token is special
        assert (of_one - rate).abs().max() <= 6 * (rate * (1 - rate) / 1000) ** 0.5


def test_a_mask_does_not_depend_on_which_tokens_are_beside() -> None:
    x_tH, token_t = torch.randn(12, 20), torch.arange(12) + 2**35
    whole_tH = dropout_reference(x_tH, token_t, 0.5, 1, 2)
    chosen = torch.tensor([7, 2, 11])
    assert torch.equal(dropout_reference(x_tH[chosen], token_t[chosen], 0.5, 1, 2), whole_tH[chosen])
