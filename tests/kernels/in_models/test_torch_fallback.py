"""The FFN in plain torch: dense products and chosen rows against float64 written out."""

from __future__ import annotations

import pytest
import torch

from sparsecast.kernels.in_models import torch_fallback
from sparsecast.kernels.ops.ffn import FFN, PredictorWeights, exact_reference, predicted_reference
from sparsecast.kernels.ops.predictor import input_dtype, reference
from sparsecast.kernels.ops.quantized import dequantized, quantized

D, F, R = 64, 48, 32
SQUARED = ["relu2", "plain relu2", "normed"]


def ffn(act: str, dtype: torch.dtype) -> FFN:
    gate, up, down = ((torch.randn(F, D) * 0.2).to(dtype) for _ in range(3))
    if act.startswith("plain"):
        biases = (torch.randn(n).to(dtype) for n in (F, D))
        return FFN(None, up, down, *biases, act="relu2" if act in SQUARED else "relu")
    if act == "normed":
        return FFN(gate, up, down, x1_norm_F=torch.randn(F).to(dtype), act="relu2", x1_norm_eps=0.5)
    return FFN(gate, up, down, act=act, threshold=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("act", ["relu", "fatrelu", "drelu", "plain", *SQUARED])
def test_both_are_the_ffn(act, tokens, dtype, monkeypatch, near):
    monkeypatch.setattr(torch_fallback, "CHUNK", 16 * D)  # several chunks
    weights, x = ffn(act, dtype), torch.randn(tokens, D, dtype=dtype)
    want, union = exact_reference(x, weights)
    assert 16 < union <= F
    near(torch_fallback.dense(x, weights), want)
    near(torch_fallback.over_rows(x, weights), want)


@pytest.mark.parametrize("format", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("act", ["fatrelu", "drelu", "plain", *SQUARED])
def test_both_leave_out_what_is_not_predicted(act, format, near):
    weights, x, z = ffn(act, torch.float32), torch.randn(5, D), torch.randn(5, D) * 3
    fc1, fc2 = torch.randn(R, D) * 0.1, torch.randn(F, R)
    kept = {"f16": torch.float16, "bf16": torch.bfloat16}
    if format in kept:
        pair = (fc1.to(kept[format]), fc2.to(kept[format]))
    else:
        pair = (quantized(fc1, format), quantized(fc2, format))
    predictor = PredictorWeights(*pair, 0.1)

    predicted = torch_fallback.predicted(z, predictor)

    want, union = predicted_reference(x, z, weights, predictor)
    assert predicted.any(0).sum() == union
    assert 0.2 < predicted.float().mean() < 0.8
    near(torch_fallback.dense(x, weights, predicted), want)
    near(torch_fallback.over_rows(x, weights, predicted), want)


@pytest.mark.parametrize("format", ["f16", "bf16", "q8_0", "q4_0"])
def test_every_decision_is_the_references(format):
    """Rounding decides on some of them; a logit at the threshold is predicted."""
    fc1, fc2, z = torch.randn(R, D) * 0.1, torch.randn(999, R), torch.randn(200, D) * 3
    z[7] = 0
    kept = {"f16": torch.float16, "bf16": torch.bfloat16}
    if format in kept:
        fc1, fc2 = fc1.to(kept[format]), fc2.to(kept[format])
    else:
        fc1, fc2 = quantized(fc1, format), quantized(fc2, format)

    got = torch_fallback.predicted(z, PredictorWeights(fc1, fc2))

    _, logits = reference(z, fc1, fc2)
    assert (logits[got != (logits >= 0)].abs() < 1e-5).all()
    assert got[7].all()
    values = PredictorWeights(dequantized(fc1), dequantized(fc2), 0.0, input_dtype(fc1))
    assert torch.equal(torch_fallback.predicted(z, values), got)


def test_nobody_fires_or_is_predicted():
    weights, x = ffn("plain", torch.float32), torch.randn(2, D)
    nothing = torch.zeros(2, F, dtype=torch.bool)
    bias = weights.down_bias_D.expand(2, D)
    assert torch.equal(torch_fallback.over_rows(x, weights, nothing), bias)
    silent = weights._replace(up_FD=weights.up_FD * 0, up_bias_F=-weights.up_bias_F.abs())
    assert torch.equal(torch_fallback.over_rows(x, silent), bias)


def test_rows_that_nobody_needs_are_not_read():
    """The gate's where nobody predicts, the others' where nothing that is predicted fires."""
    weights, x = ffn("fatrelu", torch.float32), torch.randn(3, D)
    predicted = torch.rand(3, F) < 0.3
    want = torch_fallback.over_rows(x, weights, predicted)
    fires = predicted & (torch.nn.functional.linear(x, weights.gate_FD) >= weights.threshold)
    unpredicted, silent = ~predicted.any(0), ~fires.any(0)
    assert silent.sum() > unpredicted.sum() > 0
    weights.gate_FD[unpredicted] = torch.nan
    weights.up_FD[silent] = weights.down_FD[silent] = torch.nan
    assert torch.equal(torch_fallback.over_rows(x, weights, predicted), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_square_is_float32(dtype):
    """300² is infinite in float16, and up makes 900 of it; a bfloat16 square would be rounded."""
    gate, up, down = (torch.zeros(16, 16, dtype=dtype) for _ in range(3))
    gate[3, 0], up[3, 1], down[3, 7] = 300, 0.01, 0.5
    x = torch.ones(2, 16, dtype=dtype)
    want = (300**2 * up[3, 1].float()).to(dtype) / 2
    for product in (torch_fallback.over_rows, torch_fallback.dense):
        y = product(x, FFN(gate, up, down, act="relu2"))
        assert torch.equal(y[:, 7], want.expand(2))
        assert not y[:, :7].any()


def test_a_nan_is_seen():
    weights = FFN(*(torch.randn(24, 16) for _ in range(3)))
    x = torch.randn(2, 16)
    x[1, 3] = torch.nan
    for product in (torch_fallback.over_rows, torch_fallback.dense):
        y = product(x, weights)
        assert y[1].isnan().all()
        assert not y[0].isnan().any()
        assert product(x[1:], weights).isnan().all()


def test_rows_are_summed_in_the_weights_dtype_under_autocast():
    weights = FFN(*(torch.randn(24, 16) for _ in range(3)))
    x = torch.randn(1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch_fallback.over_rows(x, weights)
    assert torch.equal(got, torch_fallback.over_rows(x, weights))
