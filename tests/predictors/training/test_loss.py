"""Gradients of the losses against autograd."""

from __future__ import annotations

import pytest
import torch

from sparsecast.core.bitmask import pack
from sparsecast.predictors.training.loss import weighted_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_loss_equals_torchs(dtype):
    logits = (6 * torch.randn(3, 100, 37)).to(dtype).requires_grad_()
    fired = torch.rand(3, 100, 37) < torch.tensor([0.0, 0.1, 1.0])[:, None, None]
    rate = torch.tensor([0.01, 0.2, 0.9])

    def torchs(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight = torch.where(y, 1.0, rate[:, None, None])
        return torch.nn.functional.binary_cross_entropy_with_logits(z.float(), y.float(), weight)

    (want,) = torch.autograd.grad(5 * torchs(logits, fired), logits)
    packed = torch.stack([pack(layer) for layer in fired])
    shown = torchs(logits[:, :64], fired[:, :64])
    loss = weighted_loss(logits, packed, rate)
    (got,) = torch.autograd.grad(5 * loss, logits)

    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-9)
    torch.testing.assert_close(loss, shown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_counting_equals_that_of_smoothed_errors(dtype):
    """Autograd on the formula in loss.py."""
    logits = (6 * torch.randn(3, 100, 37)).to(dtype).requires_grad_()
    fired = torch.rand(3, 100, 37) < torch.tensor([0.0, 0.1, 1.0])[:, None, None]
    rate = torch.tensor([0.01, 0.2, 0.9])
    chosen = torch.sigmoid(logits.float())
    weight = torch.where(fired, -1.0, rate[:, None, None])
    (want,) = torch.autograd.grad(5 * 4 * (weight * chosen).mean(), logits)
    packed = torch.stack([pack(layer) for layer in fired])
    (got,) = torch.autograd.grad(5 * weighted_loss(logits, packed, rate, counting=True), logits)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-9)


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misses_weigh_what_they_are_worth(dtype, counting):
    """Autograd on the formula in loss.py, with codes that are powers of two; a layer is silent."""
    logits = (6 * torch.randn(3, 100, 37)).to(dtype).requires_grad_()
    fired = torch.rand(3, 100, 37) < torch.tensor([0.0, 0.1, 1.0])[:, None, None]
    octaves = torch.randint(-4, 5, fired.shape)
    codes = (144 + 8 * octaves).to(torch.uint8) * fired
    amplitude = 2.0**octaves * fired
    mean = amplitude.sum((1, 2)) / fired.sum((1, 2)).clamp_min(1)
    w = amplitude / mean.clamp_min(1e-9)[:, None, None]
    rate = torch.tensor([0.01, 0.2, 0.9])[:, None, None]
    s = torch.sigmoid(logits.float())
    if counting:
        loss = 4 * (torch.where(fired, -w, rate) * s).mean()
    else:
        z = logits.float()
        softplus = torch.nn.functional.softplus
        loss = (w * softplus(-z) + rate * ~fired * softplus(z)).mean()
    (want,) = torch.autograd.grad(5 * loss, logits)
    packed = torch.stack([pack(layer) for layer in fired])
    loss = weighted_loss(logits, packed, rate.flatten(), codes, counting=counting)
    (got,) = torch.autograd.grad(5 * loss, logits)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-9)
