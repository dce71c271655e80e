"""The emulated engine against transformers, which computes all of it in another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsecast.core.models.loading import load_model
from sparsecast.export.checks.logits import model_logits, with_relu
from sparsecast.export.config import ExportConfig
from sparsecast.export.engine.emulator import Emulator, inverse_root
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.predictors.checkpoint import load_predictors

TOLERANCE = 4e-3  # one f16 rounding of x1 and of softmax; logits spread over 0.8


@pytest.fixture(scope="module")
def precise(tmp_path_factory, model_folder, predictors) -> Emulator:
    """The bundle in f32: what is left of rounding is too small to hide an error."""
    out = tmp_path_factory.mktemp("f32") / "b"
    cfg = ExportConfig(model=str(model_folder), predictors=predictors, out=out, dtype="f32")
    return Emulator(GGUFFile(export(cfg)))


@pytest.fixture(scope="module")
def relu_model(model_folder):
    model, _ = load_model(str(model_folder), device="cpu", dtype="float32")
    return with_relu(model)


@pytest.fixture(scope="module")
def ids_NS():
    return torch.randint(3, 512, (3, 100), generator=torch.Generator().manual_seed(5))


def test_everything_active_is_the_model_with_relu(precise, relu_model, ids_NS):
    diff = (precise.logits(ids_NS, all_active=True) - model_logits(relu_model, ids_NS)).abs()

    assert diff.max() < TOLERANCE
    assert diff.mean() < TOLERANCE / 10


def test_the_mask_is_the_predictors_on_the_residual_before_the_norm(
    precise, relu_model, predictors, ids_NS
):
    """transformers with a mask put into it by hooks; a wrong mask is off by fifty times."""
    dense_NSV = model_logits(relu_model, ids_NS)
    handles = []
    for layer, predictor in zip(
        relu_model.model.layers, load_predictors(predictors).layers, strict=True
    ):
        seen = {}

        def keep(module, args, seen=seen):
            seen["z"] = args[0]

        def mask(module, args, seen=seen, predictor=predictor):
            z_TD = seen["z"].flatten(0, 1)
            logits_TF = (z_TD @ predictor.fc1_RD.float().T).relu() @ predictor.fc2_FR.float().T
            return (args[0] * (logits_TF >= 0).view(args[0].shape),)

        handles += [
            layer.post_attention_layernorm.register_forward_pre_hook(keep),
            layer.mlp.down_proj.register_forward_pre_hook(mask),
        ]
    want_NSV = model_logits(relu_model, ids_NS)
    for handle in handles:
        handle.remove()

    diff_NS = (precise.logits(ids_NS) - want_NSV).abs().amax(-1)
    # Rounding turns a decision over at a few positions; every later one sees it a little.
    assert diff_NS.median() < TOLERANCE
    assert (dense_NSV - want_NSV).abs().amax(-1).median() > 50 * TOLERANCE


def test_a_threshold_no_logit_reaches_masks_everything(precise, ids_NS):
    dense_NSV = precise.logits(ids_NS, all_active=True)
    header = precise.header
    try:
        precise.header = header._replace(threshold=-1e30)
        assert torch.equal(precise.logits(ids_NS), dense_NSV)
        precise.header = header._replace(threshold=1e30)
        masked_NSV = precise.logits(ids_NS)
    finally:
        precise.header = header

    assert (masked_NSV - dense_NSV).abs().amax(-1).median() > 50 * TOLERANCE


def test_a_norms_scale_is_rounded_as_c_rounds_it():
    """numpy's float32 square root and division are correctly rounded."""
    x = torch.rand(100_000) * torch.logspace(-9, 9, 100_000)
    want = np.float32(1) / np.sqrt(x.numpy())
    assert np.array_equal(inverse_root(x).numpy(), want)


def test_ropes_angles_turn_as_c_turns_them(precise):
    """By repeated float32 multiplication; cosine and sine of them rounded once."""
    size, base = precise.header.head_dim, precise.header.rope_base
    step = np.float32(base) ** np.float32(-2 / size)
    angle_SE = np.empty((100, size // 2), np.float32)
    angle_SE[:, 0] = np.arange(100)
    for e in range(1, size // 2):
        angle_SE[:, e] = angle_SE[:, e - 1] * step

    cos_SE, sin_SE = precise._rope_table(100)

    assert np.array_equal(cos_SE.numpy(), np.cos(angle_SE.astype(np.float64)).astype(np.float32))
    assert np.array_equal(sin_SE.numpy(), np.sin(angle_SE.astype(np.float64)).astype(np.float32))
