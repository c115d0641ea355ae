"""NEFTune's noise has the paper's size for each example, however examples share a row (arXiv:2310.05914)."""

from __future__ import annotations

import pytest
import torch

from sft.trainee import neftune_noise

DIM, ALPHA = 64, 5.0


def bound(tokens: int) -> float:
    return ALPHA / float(tokens * DIM) ** 0.5


def test_by_eye() -> None:
    """alpha 5, 4 tokens of 25 features: 5 / sqrt(100) = 0.5."""
    noise = neftune_noise(torch.zeros(1, 4, 25), (4,), 5.0)
    assert 0.45 < float(noise.abs().max()) <= 0.5


@pytest.mark.parametrize("lengths", [(400,), (3, 50, 200)])
def test_in_a_flat_row_each_example_has_its_own_size(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    noise = neftune_noise(torch.zeros(1, sum(lengths), DIM), lengths, ALPHA)
    for part, tokens in zip(torch.split(noise[0], list(lengths)), lengths, strict=True):
        assert 0.9 * bound(tokens) < float(part.abs().max()) <= bound(tokens)
        # uniform from -bound to bound: its spread is bound / sqrt(3), around zero
        assert float(part.std()) == pytest.approx(bound(tokens) / 3**0.5, rel=0.15)
        assert abs(float(part.mean())) < bound(tokens) / 4


def test_in_a_padded_batch_the_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    noise = neftune_noise(torch.zeros(2, 200, DIM, dtype=torch.bfloat16), (20, 200), ALPHA)
    assert noise.dtype == torch.bfloat16
    for part, tokens in zip(noise.float(), (20, 200), strict=True):
        assert 0.9 * bound(tokens) < float(part.abs().max()) <= bound(tokens) * 1.01  # rounded to bfloat16
