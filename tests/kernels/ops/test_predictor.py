"""The predictor: hidden units, decisions, and the formats of its weights."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from sparsecast.kernels.ops import bitmask, predictor
from sparsecast.kernels.ops.int8_dot import quantize_input
from sparsecast.kernels.ops.quantized import Quantized, dequantized, quantized
from sparsecast.predictors.formats import rounded


@pytest.fixture
def weights(matrix, banded):
    def make(rows, columns, dtype):
        if dtype in ("f16", "bf16"):
            return matrix(rows, columns, {"f16": torch.float16, "bf16": torch.bfloat16}[dtype])
        return Quantized(*map(banded, quantized(torch.randn(rows, columns) * 0.1, dtype)))

    return make


SMALL = [((96, 64, 130), 0.25), ((32, 32, 17), 0.0), ((32, 64, 21), -0.1), ((1312, 32, 16), 0.25)]
TILES = [((64, 288, 20), 0.25), ((2112, 32, 16), 0.25), ((4128, 32, 16), 0.25)]
"""Several tiles of codes, the last of them not full."""


def cases(shapes, dtypes, counts):
    """All of (shape, threshold, dtype, tokens); those that are not slow have every pair of them."""
    return [
        pytest.param(
            *shape, dtype, tokens, marks=() if (i + j + k) % len(dtypes) == 0 else pytest.mark.slow
        )
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(dtypes)
        for k, tokens in enumerate(counts)
    ]


CASES = cases(SMALL, ("f16", "bf16", "q8_0", "q4_0"), (1, 3, 5, 16))
CASES += cases(TILES, ("q8_0", "q4_0"), (1, 3, 5))


@pytest.mark.parametrize(("shape", "threshold", "dtype", "tokens"), CASES, ids=str)
def test_it_decides_as_its_reference(
    shape, threshold, tokens, dtype, weights, banded, values, near
):
    """Behind the last token and neuron, at a threshold of 0, nothing is predicted."""
    d, rank, f = shape
    fc1, fc2 = weights(rank, d, dtype), weights(f, rank, dtype)
    z = banded(3 * torch.randn(tokens, d))

    hidden = predictor.hidden(z, fc1)
    (mask, blank), chosen = predictor.select(hidden, fc2, threshold)

    met, _ = predictor.reference(z, fc1, fc2)
    if isinstance(fc1, Quantized):
        rounded_TBS = quantize_input(hidden)
        scale_TB, hidden = rounded_TBS[..., 8].view(torch.float32), values(rounded_TBS)
        # A float32 sum beside a float64 one may fall to the other side of a half, in a code or a
        # block's scale.
        off_TBK = (hidden - met).abs().view(tokens, -1, 32)
        assert (off_TBK <= 1.01 * scale_TB[..., None]).all()
        assert (off_TBK > 1e-6).any(-1).sum() <= 1
    else:
        near(hidden, met.to(hidden.dtype))
    logits = hidden.double() @ dequantized(fc2).double().T
    token = torch.arange(tokens, device=z.device)
    got = ((chosen >> token[:, None]) & 1).bool()
    differ = got != (logits >= threshold)
    assert not (differ & ((logits - threshold).abs() > 1e-5 * logits.abs().max())).any()
    assert torch.equal(bitmask.reference(mask, f), got.any(0))
    assert not bitmask.reference(mask, 16 * len(mask))[f:].any()
    assert (chosen >> tokens == 0).all()
    assert blank is None if tokens > 1 else (blank == -1).all()


@pytest.mark.parametrize(("tokens", "early"), [(1, [False, True]), (2, [False, False])])
def test_nothing_starts_before_the_first_kernel_has_waited(
    tokens, early, weights, banded, monkeypatch
):
    """launch.py; with one token fc2's kernel may start while fc1's runs."""
    taken = []

    def told(x, *, early=False):
        taken.append(early)
        return quantize_input(x, early=early)

    monkeypatch.setattr(predictor, "quantize_input", told)
    fc1, fc2 = weights(32, 64, "q8_0"), weights(17, 32, "q8_0")
    predictor.predict(banded(torch.randn(tokens, 64)), fc1, fc2, 0.0)
    assert taken == early


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_odd_widths_and_a_logit_at_the_threshold(tokens, dtype, banded):
    """PowerInfer computes a neuron whose logit equals the threshold."""
    z = banded(torch.ones(tokens, 3))
    fc1 = banded(torch.tensor([[1.0, 1, 1], [-1, -1, -1]], dtype=dtype))
    fc2 = banded(torch.tensor([[0.5, 9], [0.4, 9], [-1, -9], [1, 0]], dtype=dtype))

    (mask, _), chosen = predictor.predict(z, fc1, fc2, 1.5)

    assert bitmask.reference(mask, 4).tolist() == [True, False, False, True]
    assert chosen.tolist() == [2**tokens - 1, 0, 0, 2**tokens - 1]


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_codes_are_ggmls_and_values_those_of_the_predictors_file(dtype):
    weight = torch.randn(7, 96)
    ours = quantized(weight, dtype)

    stored = quantize(weight.numpy(), GGMLQuantizationType[dtype.upper()]).reshape(7, 3, -1)
    unsigned = 0x88 if dtype == "q4_0" else 0
    theirs = (stored[..., 2:] ^ unsigned).reshape(7, -1)
    assert ours.code_NC.numpy().astype("<i4").tobytes() == theirs.tobytes()
    assert torch.equal(dequantized(ours), rounded(weight, dtype))
    again = quantized(dequantized(ours), dtype)
    assert torch.equal(again.code_NC, ours.code_NC)
    assert torch.equal(again.scale_NB, ours.scale_NB)
    assert ours.shape == (7, 96)
    assert ours.nbytes * 8 / weight.numel() == {"q8_0": 8.5, "q4_0": 4.5}[dtype]


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_blocks_of_zeros_and_of_next_to_nothing_are_zero(dtype):
    weight = torch.randn(3, 96)
    weight[0, :32], weight[1, 32:64] = 0, 1e-41
    ours = quantized(weight, dtype)
    assert torch.equal(dequantized(ours), rounded(weight, dtype))
    assert not dequantized(ours)[0, :32].any()
    assert not dequantized(ours)[1, 32:64].any()
    assert not ours.code_NC[0, : ours.bits].any()
    assert not ours.code_NC[1, ours.bits : 2 * ours.bits].any()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_weights_of_other_strides_are_taken(dtype):
    weight = torch.randn(64, 32).T
    want = quantized(weight.contiguous(), dtype)
    for ours, theirs in zip(quantized(weight, dtype), want, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()


def test_what_has_no_blocks_is_refused():
    for weight, dtype in ((torch.ones(2, 40), "q4_0"), (torch.ones(2, 32), "q5_0")):
        with pytest.raises(ValueError, match="expected 'q8_0'|use f16 weights"):
            quantized(weight, dtype)
