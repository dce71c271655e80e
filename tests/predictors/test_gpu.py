"""What differs on a GPU: the compiled gradient of the loss, bf16 training, where batches lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsecast.core.bitmask import pack
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, count
from sparsecast.predictors.train import train
from sparsecast.predictors.training.data import TokenBlocks
from sparsecast.predictors.training.loss import weighted_loss
from sparsecast.predictors.training.resident import ResidentBlocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 70, 201), (1, 1, 8), (2, 64, 1024)])
def test_the_compiled_gradient_equals_the_cpus(shape, dtype, counting, by_value, monkeypatch):
    monkeypatch.setattr("sparsecast.core.compiled.LARGE", 0)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype)
    fired = torch.rand(shape, generator=generator) < 0.2
    rate = torch.rand(shape[0], generator=generator)
    packed = torch.stack([pack(layer) for layer in fired])
    value = torch.randint(100, 200, shape, generator=generator, dtype=torch.uint8)
    values = [value, value.cuda()] if by_value else [None, None]
    z = logits.clone().requires_grad_()
    loss = weighted_loss(z, packed, rate, values[0], counting=counting)
    (want,) = torch.autograd.grad(3 * loss, z)
    z = logits.cuda().requires_grad_()
    loss = weighted_loss(z, packed.cuda(), rate.cuda(), values[1], counting=counting)
    (got,) = torch.autograd.grad(3 * loss, z)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.cpu(), want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-9
    )


def test_pinned_batches_equal_plain_ones(synthetic):
    pinned = TokenBlocks(synthetic, "train", 128, seed=3, for_gpu=True)
    plain = TokenBlocks(synthetic, "train", 128, seed=3)
    for one, two in zip(pinned, plain, strict=True):
        assert one.x_LBD.is_pinned()
        assert torch.equal(one.x_LBD, two.x_LBD)
        assert torch.equal(one.mask_LBP, two.mask_LBP)


def test_batches_of_a_split_on_the_gpu_equal_plain_ones(synthetic):
    resident = ResidentBlocks(synthetic, "train", 128, seed=3, device=torch.device("cuda"))
    plain = TokenBlocks(synthetic, "train", 128, seed=3)
    for one, two in zip(resident, plain, strict=True):
        assert one.x_LBD.is_cuda
        assert torch.equal(one.x_LBD.cpu(), two.x_LBD)
        assert torch.equal(one.mask_LBP.cpu(), two.mask_LBP)


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
def test_predictors_trained_in_bf16_meet_the_target_as_stored(recipe, synthetic, tmp_path, dtype):
    cfg = replace(recipe, out=tmp_path / "pred", device="cuda", predictor_dtype=dtype)
    for layer, predictor in enumerate(train(cfg).layers):
        total = Counts(0, 0, 0, 0)
        for x_TD, active_TF in layer_batches(synthetic, "calibration", layer):
            total = total.plus(count(predictor.logits(x_TD) >= 0, active_TF))
        assert total.recall == pytest.approx(0.95, abs=0.004)
        assert total.predicted_sparsity > total.true_sparsity - 0.12
