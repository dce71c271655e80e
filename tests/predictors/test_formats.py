"""Formats of predictor weights against the gguf package, and bias units in each of them."""

from __future__ import annotations

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


def test_gradients_pass_as_if_nothing_was_rounded():
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
    """Against the engine's steps written out, block by block."""
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
    """A predictor with 60 or 62 units, and inputs along which u x_hat is about 1."""
    free = 64 - bias_units(dtype)
    mean = torch.randn(96)
    x = (mean + 0.3 * torch.randn(50, 96)) * (0.1 + 10 * torch.rand(50, 1))
    u = mean / mean.square().sum() * 8
    fc1 = torch.randn(free, 96) / 96**0.5
    fc2 = torch.randn(200, free) / 8
    return BiasUnits(fc1, fc2, offset_scale * torch.randn(200), u, dtype), x


def uncut(dtype: str) -> tuple[UncalibratedPredictor, torch.Tensor]:
    """As the default recipe makes them: in f16 with the constant in 64 units' least squares."""
    made, x = with_units(dtype)
    if dtype != "f16":
        return made, x
    mean = x.mean(0) / x.mean(0).norm()
    fc1, fc2 = unit_rows(torch.randn(64, 96) / 96**0.5 + mean, torch.randn(200, 64) / 8)
    hidden = (rms_normalized(x) @ fc1.T).relu()
    return SpreadBias(fc1, fc2, torch.linalg.lstsq(hidden, torch.ones(50, 1)).solution[:, 0]), x


@pytest.mark.parametrize("cut", [-1.7, 0.0, 2.5])
def test_the_bias_subtracts_the_cut_times_a_positive_number(cut):
    """Before rounding to f16 the identity is exact."""
    made, x = with_units("f16")
    fc1, fc2 = assembled(made.fc1_RD, made.fc2_FR, made.offset_F - cut, made.bias_D, "f16")
    moved = (x @ fc1.T).relu() @ fc2.T
    b = (x @ made.bias_D).abs()[:, None]
    plain = (x @ made.fc1_RD.T).relu() @ made.fc2_FR.T + b * (made.offset_F - cut)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)
    assert (b > 0).all()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_offsets_have_two_digits(dtype):
    """One column of codes would be off by half a step of the whole block; the pair is not."""
    made, _ = with_units(dtype, offset_scale=0.1)
    _, fc2 = assembled(made.fc1_RD, made.fc2_FR, made.offset_F, made.bias_D, dtype, gradient=False)
    kept = fc2[:, 0] + fc2[:, 2] / 8
    one_digit = (fc2[:, 0] - made.offset_F).abs()
    assert torch.equal(fc2[:, 0], fc2[:, 1])
    assert torch.equal(fc2[:, 2], fc2[:, 3])
    assert (kept - made.offset_F).abs().mean() < 0.15 * one_digit.mean()


@pytest.mark.parametrize("dtype", BITS)
def test_a_cut_predictor_is_what_its_file_holds(dtype):
    made, x = uncut(dtype)
    predictor = made.at_threshold(0.7)
    again = Predictor(*predictor.weights, dtype).stored()
    for one, two in zip(predictor.weights, again.weights, strict=True):
        assert torch.equal(one, two)
    assert predictor.rank == 64
    # The same decisions for the raw and the normalized input, up to rounding.
    raw, scaled = predictor.logits(x) >= 0, predictor.logits(rms_normalized(x)) >= 0
    assert (raw == scaled).float().mean() > (0.999 if dtype == "f16" else 0.99)


@pytest.mark.parametrize("dtype", BITS)
def test_moving_the_cut_moves_decisions_where_it_says(dtype):
    """p / b of the uncut file against c, and the sign of the file cut at c."""
    made, x = uncut(dtype)
    base = made.at_threshold(0.0)
    ratio = base.logits(x) / bias_of(base, made.constant_R, x)
    for c in (-1.0, 0.5):
        moved = made.at_threshold(c).logits(x) >= 0
        sure = (ratio - c).abs() > {"f16": 0.01, "q8_0": 0.05, "q4_0": 0.4}[dtype]
        assert torch.equal(moved[sure], (ratio >= c)[sure])
        assert sure.float().mean() > 0.5


@pytest.mark.parametrize("dtype", BITS)
def test_inputs_of_products_are_rounded_to_the_formats_partner(dtype):
    x = torch.randn(4, 64)
    partner = "f16" if dtype == "f16" else "q8_0"
    assert torch.equal(rounded_input(x, dtype), rounded(x, partner))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("tiny", [0.0, 1e-41, -1e-39])
def test_blocks_of_next_to_nothing_are_zeros_and_not_nan(tiny, dtype):
    values = torch.full((2, 64), tiny)
    values[0, 32:] = 1.0
    for held in (rounded(values, dtype), rounded_input(values, dtype)):
        assert (held[0, :32] == 0).all()
        assert (held[1] == 0).all()
        assert ((held[0, 32:] - 1).abs() < 1e-3).all()
