"""Predictor formats, compared with the gguf package, and folded thresholds in each of them."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.core.errors import InputError
from sparsecast.predictors.calibration.bias import (
    BiasUnits,
    SpreadBias,
    UncalibratedPredictor,
    assembled,
    bias_of,
    bias_units,
    unit_rows,
)
from sparsecast.predictors.formats import (
    BITS,
    check_widths,
    rounded,
    rounded_input,
    straight_through,
)
from sparsecast.predictors.predictor import Predictor, rms_normalized

KINDS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def theirs(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    kind = KINDS[dtype]
    packed = gguf.quants.quantize(weight.numpy(), kind)
    assert packed.nbytes * 8 == weight.numel() * BITS[dtype]
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


@pytest.mark.parametrize("dtype", KINDS)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), rows=st.integers(1, 5))
def test_rounding_is_the_gguf_packages_and_idempotent(dtype, seed, scale, rows):
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(rows, 96, generator=generator)
    weight[0, :32] = 0.0
    weight[-1, 40] = weight[-1].abs().max() * 30  # an outlier takes its block's range
    once = rounded(weight, dtype)
    assert torch.equal(once, theirs(weight, dtype))
    assert torch.equal(rounded(once, dtype), once)
    assert torch.equal(theirs(once, dtype), once)


def test_gradients_ignore_the_rounding():
    weight = torch.randn(3, 64, requires_grad=True)
    factor = torch.randn(3, 64)
    (straight_through(weight, "q4_0") * factor).sum().backward()
    assert torch.equal(weight.grad, factor)


@pytest.mark.parametrize(
    ("rank", "hidden", "match"),
    [(100, 64, "the rank is 100"), (64, 100, "the hidden size is 100")],
)
def test_rows_that_do_not_divide_into_blocks_are_refused(rank, hidden, match):
    check_widths("f16", rank=rank, hidden_size=hidden)
    with pytest.raises(InputError, match=match):
        check_widths("q4_0", rank=rank, hidden_size=hidden)


@pytest.mark.parametrize("dtype", BITS)
def test_logits_round_the_input_of_both_products(dtype):
    """Compare with the engine's steps, computed block by block."""
    predictor = Predictor(torch.randn(64, 96), torch.randn(40, 64) / 8, dtype).stored()
    x = 5 * torch.randn(20, 96)
    x[3] *= 100

    def partner(value: np.ndarray) -> np.ndarray:
        if dtype == "f16":
            return value.astype(np.float16).astype(np.float64)
        blocks = value.reshape(len(value), -1, 32).astype(np.float64)
        scale = np.abs(blocks).max(2, keepdims=True) / 127
        codes = np.rint(blocks / np.where(scale == 0, 1, scale))
        return (codes * scale.astype(np.float16)).reshape(value.shape)

    fc1, fc2 = (w.double().numpy() for w in predictor.weights)
    hidden = np.maximum(partner(x.numpy()) @ fc1.T, 0)
    want = partner(hidden) @ fc2.T
    got = predictor.logits(x).double().numpy()
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()
    assert (np.abs(got - want) < 1e-4 * np.abs(want).max(1, keepdims=True)).mean() > 0.99


def with_units(dtype: str, offset_scale: float = 1.0) -> tuple[BiasUnits, torch.Tensor]:
    """A predictor with 60 or 62 units, and inputs with u x_hat of about 1."""
    free = 64 - bias_units(dtype)
    mean = torch.randn(96)
    x = (mean + 0.3 * torch.randn(50, 96)) * (0.1 + 10 * torch.rand(50, 1))
    u = mean / mean.square().sum() * 8
    fc1 = torch.randn(free, 96) / 96**0.5
    fc2 = torch.randn(200, free) / 8
    mean = rms_normalized(x).mean(0)
    return BiasUnits(fc1, fc2, offset_scale * torch.randn(200), u, mean, dtype), x


def uncalibrated(dtype: str) -> tuple[UncalibratedPredictor, torch.Tensor]:
    """A predictor as the default recipe builds it; in f16 with a combination of 64 units."""
    units, x = with_units(dtype)
    if dtype != "f16":
        return units, x
    mean = x.mean(0) / x.mean(0).norm()
    fc1, fc2 = unit_rows(torch.randn(64, 96) / 96**0.5 + mean, torch.randn(200, 64) / 8)
    hidden = (rms_normalized(x) @ fc1.T).relu()
    return SpreadBias(fc1, fc2, torch.linalg.lstsq(hidden, torch.ones(50, 1)).solution[:, 0]), x


@pytest.mark.parametrize("threshold", [-1.7, 0.0, 2.5])
def test_folding_subtracts_the_threshold_times_a_positive_number(threshold):
    """The identity is exact before rounding to f16."""
    units, x = with_units("f16")
    fc1, fc2 = assembled(
        units.fc1_RD, units.fc2_FR, units.offset_F - threshold, units.bias_D, units.mean_D, "f16"
    )
    moved = (x @ fc1.T).relu() @ fc2.T
    b = (x @ units.bias_D).abs()[:, None]
    plain = (x @ units.fc1_RD.T).relu() @ units.fc2_FR.T + b * (units.offset_F - threshold)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)
    assert (b > 0).all()


def at_mean(fc1: torch.Tensor, fc2: torch.Tensor, units: BiasUnits) -> torch.Tensor:
    """Logits at the mean input, over b of the stored bias units."""
    mean = units.mean_D.double()
    b = (rounded(units.bias_D[None], units.dtype).double() @ mean).abs()
    return (fc2.double() @ (fc1.double() @ mean).relu()) / b


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_offsets_have_two_digits(dtype):
    """One column of codes is off by up to half a step; the second digit corrects it."""
    units, _ = with_units(dtype, offset_scale=0.1)
    fc1, fc2 = assembled(
        units.fc1_RD,
        units.fc2_FR,
        units.offset_F,
        units.bias_D,
        units.mean_D,
        dtype,
        gradient=False,
    )
    whole = at_mean(units.fc1_RD, units.fc2_FR, units) + units.offset_F
    wanted = whole - at_mean(fc1[4:], fc2[:, 4:], units)
    one_digit = (fc2[:, 0] - wanted).abs()
    assert torch.equal(fc2[:, 0], fc2[:, 1])
    assert torch.equal(fc2[:, 2], fc2[:, 3])
    assert (fc2[:, 0] + fc2[:, 2] / 8 - wanted).abs().mean() < 0.15 * one_digit.mean()


@pytest.mark.parametrize("coarse", [None, 0.31])
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_rounding_moves_no_logit_at_the_mean_input(dtype, coarse):
    """But by what the second digit leaves of it."""
    units, _ = with_units(dtype, offset_scale=0.1)
    units = replace(units, fc1_RD=units.fc1_RD + units.bias_D / 8)  # no unit is near 0 there
    fc1, fc2 = units.at_threshold(0.3, coarse).weights
    wanted = at_mean(units.fc1_RD, units.fc2_FR, units) + units.offset_F - 0.3
    plain = at_mean(fc1[4:], fc2[:, 4:], units) + units.offset_F - 0.3
    found = at_mean(fc1, fc2, units)
    assert (found - wanted).abs().mean() < 0.2 * (plain - wanted).abs().mean()


def test_training_is_corrected_as_the_file_is_and_has_its_gradient():
    """Straight through: the gradient of every weight and offset as if nothing had been rounded."""
    units, x = with_units("q4_0")
    given = [t.clone().requires_grad_() for t in (units.fc1_RD, units.fc2_FR, units.offset_F)]
    fc1, fc2 = assembled(*given, units.bias_D, units.mean_D, "q4_0")
    for one, two in zip((fc1, fc2), units.at_threshold(0.0).weights, strict=True):
        assert torch.equal(one, two)
    fc1.sum().backward(retain_graph=True)
    (fc2 * torch.arange(64.0)).sum().backward()
    assert torch.equal(given[0].grad, torch.ones_like(given[0]))
    assert torch.equal(given[1].grad, torch.arange(4.0, 64).expand(200, 60))
    assert torch.equal(given[2].grad, torch.ones(200))  # of columns 0 and 1


@pytest.mark.parametrize("dtype", BITS)
def test_a_calibrated_predictor_equals_its_file(dtype):
    before, x = uncalibrated(dtype)
    predictor = before.at_threshold(0.7)
    again = Predictor(*predictor.weights, dtype).stored()
    for one, two in zip(predictor.weights, again.weights, strict=True):
        assert torch.equal(one, two)
    assert predictor.rank == 64
    # The same decisions for the raw and the normalized input, up to rounding.
    raw, scaled = predictor.logits(x) >= 0, predictor.logits(rms_normalized(x)) >= 0
    assert (raw == scaled).float().mean() > (0.999 if dtype == "f16" else 0.99)


@pytest.mark.parametrize("dtype", BITS)
def test_a_folded_threshold_decides_like_the_scores(dtype):
    """Compare p / b of the predictor at threshold 0 with the decisions of one with c folded in."""
    before, x = uncalibrated(dtype)
    base = before.at_threshold(0.0)
    ratio = base.logits(x) / bias_of(base, before.constant_R, x)
    for c in (-1.0, 0.5):
        moved = before.at_threshold(c).logits(x) >= 0
        sure = (ratio - c).abs() > {"f16": 0.01, "q8_0": 0.05, "q4_0": 0.4}[dtype]
        assert torch.equal(moved[sure], (ratio >= c)[sure])
        assert sure.float().mean() > 0.5


@pytest.mark.parametrize("dtype", BITS)
def test_inputs_of_products_are_rounded_as_the_engine_does(dtype):
    x = torch.randn(4, 64)
    partner = "f16" if dtype == "f16" else "q8_0"
    assert torch.equal(rounded_input(x, dtype), rounded(x, partner))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("tiny", [0.0, 1e-41, -1e-39])
def test_blocks_of_tiny_values_become_zeros_and_not_nan(tiny, dtype):
    values = torch.full((2, 64), tiny)
    values[0, 32:] = 1.0
    for held in (rounded(values, dtype), rounded_input(values, dtype)):
        assert (held[0, :32] == 0).all()
        assert (held[1] == 0).all()
        assert ((held[0, 32:] - 1).abs() < 1e-3).all()
