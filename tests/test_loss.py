"""The chunked losses against torch's own cross entropy on the full matrix of logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from sft import loss as losses
from sft.loss import LogitTransform, head_loss_sum, linear_loss_sum, logits_loss_sum


def tensors(m: int = 37, d: int = 12, v: int = 50) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(m, d, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, v, (m,), generator=generator)
    weights = torch.rand(m, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, weights


def oracle(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * weights).sum()


Loss = Callable[..., torch.Tensor]


def by_head(hidden: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return head_loss_sum(hidden, lambda h: h @ weight.T, weight.shape[0], *rest)


@pytest.mark.parametrize(
    ("targets", "rows", "sizes"), [(0, 5, []), (4, 5, [4]), (5, 5, [5]), (6, 5, [3, 3]), (11, 5, [3, 4, 4])]
)
def test_chunks_are_few_and_nearly_equal(targets: int, rows: int, sizes: list[int]) -> None:
    parts = list(losses.chunks(targets, rows))
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(targets)[part]] == list(range(targets))


@pytest.mark.parametrize("function", [linear_loss_sum, by_head])
@pytest.mark.parametrize("rows", [1, 8, 37, 100])
def test_value_and_gradients_equal_the_full_matrix(function: Loss, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_rows", lambda vocabulary, device: rows)
    hidden, weight, targets, weights = tensors()
    expected = oracle(hidden, weight, targets, weights)
    expected_grads = torch.autograd.grad(expected / 7, (hidden, weight))
    found = function(hidden, weight, targets, weights)
    grads = torch.autograd.grad(found / 7, (hidden, weight))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets, weights = tensors()
    weight = weight.detach()
    linear_loss_sum(hidden, weight, targets, weights).backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("function", [linear_loss_sum, by_head])
def test_without_a_target_the_head_still_takes_part(function: Loss) -> None:
    """DDP waits for a gradient of every trained weight on every rank, idle ones too."""
    hidden, weight, targets, weights = tensors()
    function(hidden[:0], weight, targets[:0], weights[:0]).backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("function", [linear_loss_sum, by_head])
def test_no_target_is_harmless(function: Loss) -> None:
    hidden, weight, targets, weights = tensors()
    loss = function(hidden[:0], weight, targets[:0], weights[:0])
    assert loss.item() == 0
    loss.backward()


def test_weights_weigh() -> None:
    hidden, weight, targets, _ = tensors()
    ones = torch.ones(len(targets), dtype=torch.float64)
    halves = torch.where(torch.arange(len(targets)) < 10, 0.5, 1.0).double()
    whole, half = (linear_loss_sum(hidden, weight, targets, w) for w in (ones, halves))
    first = linear_loss_sum(hidden[:10], weight, targets[:10], ones[:10])
    torch.testing.assert_close(whole - half, first / 2, rtol=1e-5, atol=1e-4)


def test_transform_scales_then_caps() -> None:
    assert LogitTransform(scale=2.0, softcap=3.0)(torch.tensor([1.0])).item() == pytest.approx(3 * 0.5827829)
    assert LogitTransform()(torch.tensor([5.0])).item() == 5


def test_logits_of_a_models_own_head() -> None:
    hidden, weight, targets, weights = tensors()
    expected = oracle(hidden, weight, targets, weights)
    torch.testing.assert_close(
        logits_loss_sum(hidden @ weight.T, targets, weights).double(), expected, rtol=1e-5, atol=0
    )
