"""The whole FFN: exact and predicted, per token, as torch operators, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sparsecast.kernels.ops import down
from sparsecast.kernels.ops.ffn import (
    FFN,
    PredictorWeights,
    exact_ffn,
    exact_reference,
    predicted_ffn,
)
from sparsecast.kernels.ops.quantized import Quantized, quantized

D, F, R = 96, 77, 32
ACTS = ["relu", "fatrelu", "drelu", "plain"]


def cases(*first):
    """All of (one of `first`, 1 or 4 tokens, an activation); those that are not slow have every
    pair of them."""
    return [
        pytest.param(x, tokens, act, marks=() if (i + j + k) % 2 == 0 else pytest.mark.slow)
        for i, x in enumerate(first)
        for j, tokens in enumerate((1, 4))
        for k, act in enumerate(ACTS)
    ]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Most of the usual number would find nothing to do here, and the interpreter is slow."""
    monkeypatch.setattr(down, "ONE_TOKEN_GROUPS", 4)


@pytest.fixture
def ffn(matrix, banded):
    def make(act, dtype) -> FFN:
        gate, up, down = (matrix(F, D, dtype) for _ in range(3))
        if act == "plain":
            up_bias, down_bias = (banded(torch.randn(n).to(dtype)) for n in (F, D))
            return FFN(None, up, down, up_bias, down_bias)
        return FFN(gate, up, down, act=act, threshold=0.3)

    return make


@pytest.fixture
def predictor(matrix, banded):
    def make(dtype) -> PredictorWeights:
        if dtype == "f16":
            return PredictorWeights(matrix(R, D, torch.float16), matrix(F, R, torch.float16), 0.1)
        parts = (quantized(torch.randn(*s) * 0.1, dtype) for s in ((R, D), (F, R)))
        return PredictorWeights(*(Quantized(*map(banded, part)) for part in parts), 0.1)

    return make


@pytest.mark.parametrize(("dtype", "tokens", "act"), cases(torch.float16, torch.bfloat16), ids=str)
def test_exact_is_the_dense_ffn(dtype, tokens, act, ffn, banded, decided, near):
    weights, x = ffn(act, dtype), banded(torch.randn(tokens, D).to(dtype))

    y, union = exact_ffn(x, weights)

    want, want_union = decided(x, weights)
    near(y, want)
    assert union.dtype == torch.int32
    assert union.shape == ()
    assert union == want_union


@pytest.mark.parametrize(("stored", "tokens", "act"), cases("f16", "q8_0", "q4_0"), ids=str)
def test_predicted_is_the_ffn_of_what_the_predictor_names(
    stored, tokens, act, ffn, predictor, banded, decided, near
):
    weights, named = ffn(act, torch.float16), predictor(stored)
    x, z = banded(torch.randn(tokens, D).half()), banded(torch.randn(tokens, D))

    y, union = predicted_ffn(x, z, weights, named)

    want, want_union = decided(x, weights, z, named)
    near(y, want)
    assert union == want_union


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["f16", "q4_0"])
def test_a_tokens_output_does_not_depend_on_the_batch(stored, ffn, predictor, banded, near):
    weights, named = ffn("fatrelu", torch.float16), predictor(stored)
    x, z = banded(torch.randn(3, D).half()), banded(torch.randn(3, D))
    together = exact_ffn(x, weights)[0], predicted_ffn(x, z, weights, named)[0]
    for t in range(3):
        one = slice(t, t + 1)
        near(exact_ffn(x[one], weights)[0], together[0][one])
        near(predicted_ffn(x[one], z[one], weights, named)[0], together[1][one])


def test_every_run_gives_the_same_bits(ffn, predictor, banded):
    weights, named = ffn("relu", torch.bfloat16), predictor("q8_0")
    x = banded(torch.randn(3, D).bfloat16())
    assert torch.equal(exact_ffn(x, weights)[0], exact_ffn(x, weights)[0])
    first = predicted_ffn(x, x, weights, named)[0]
    assert torch.equal(predicted_ffn(x, x, weights, named)[0], first)


@pytest.mark.parametrize("tokens", [1, 2])
def test_nothing_fires_everything_fires(tokens, ffn, predictor, banded, near):
    weights = ffn("relu", torch.float16)
    x = banded(torch.rand(tokens, D).half() + 0.1)
    for sign, union in ((-1, 0), (1, F)):
        weights.gate_FD.abs_().mul_(sign)
        y, count = exact_ffn(x, weights)
        near(y, exact_reference(x, weights)[0])
        assert count == union
    named = predictor("f16")._replace(threshold=1e9)
    y, count = predicted_ffn(x, x, weights, named)
    assert count == 0
    assert not y.any()


@pytest.mark.parametrize("predicts", [False, True])
@pytest.mark.parametrize("tokens", [1, pytest.param(2, marks=pytest.mark.slow), 6])
def test_a_nan_stays_in_its_token_and_is_seen(tokens, predicts, ffn, predictor, banded, near):
    """Also where no other token makes the NaN's neurons fire."""
    weights, named = ffn("fatrelu", torch.float16), predictor("q8_0")
    x = banded(torch.randn(tokens, D).half())
    x[-1, 5] = torch.nan
    clean = x.nan_to_num()

    def run(x):
        z = clean
        return predicted_ffn(x, z, weights, named)[0] if predicts else exact_ffn(x, weights)[0]

    assert run(x)[-1].isnan().all()
    near(run(x)[:-1], run(clean)[:-1])


def test_a_hidden_size_of_more_pieces_than_one(matrix, banded, decided, near):
    """Each has its own ticket in the down projection."""
    weights = FFN(*(matrix(40, 1100, torch.float16) for _ in range(3)))
    x = banded(torch.randn(1, 1100).half())
    near(exact_ffn(x, weights)[0], decided(x, weights)[0])


def test_tensors_of_other_strides_are_taken(ffn, banded, near):
    weights = ffn("relu", torch.float16)
    x = torch.randn(D, 3, device=weights.up_FD.device).half().T
    near(exact_ffn(x, weights)[0], exact_reference(x, weights)[0])


def test_torch_compile_sees_operators_without_a_break(ffn, predictor, banded):
    weights, named = ffn("relu", torch.float16), predictor("q4_0")
    x = banded(torch.randn(2, D).half())

    def both(x):
        return exact_ffn(x, weights)[0] + predicted_ffn(x, x, weights, named)[0]

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), both(x))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"act": "silu"}, "act: got 'silu', expected one of relu, fatrelu, drelu"),
        ({"threshold": -1.0}, "threshold: got -1.0, expected a number >= 0"),
        ({"threshold": float("nan")}, "threshold: got nan"),
        ({"gate_FD": None, "act": "drelu"}, "drelu is ReLU on gate and up"),
        (
            {"up_bias_F": torch.zeros(F)},
            "up_bias_F, down_bias_D: expected None in an FFN with a gate",
        ),
        ({"down_FD": torch.zeros(D, F).half()}, r"down_FD: is \(96, 77\), expected \(77, 96\)"),
        ({"gate_FD": torch.zeros(F, D)}, "gate_FD: is torch.float32 on"),
        ({"up_FD": torch.zeros(D, F).half().T}, "up_FD: is not contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, told, ffn, device):
    weights = ffn("relu", torch.float16)
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=told) as error:
        exact_ffn(torch.zeros(1, D, device=device).half(), weights._replace(**change))
    assert "\n" not in str(error.value)


def test_more_neurons_than_a_grid_takes_are_refused(device):
    wide = torch.empty(1, 1, device=device).half().expand(65535 * 16 + 1, 1)
    with pytest.raises(ValueError, match="has 1048561 neurons, expected at most 1048560"):
        exact_ffn(torch.zeros(1, 1, device=device).half(), FFN(None, wide, wide))


def test_inputs_and_predictors_that_do_not_fit_are_refused(ffn, predictor, device):
    weights, named = ffn("relu", torch.float16), predictor("q4_0")
    x = torch.zeros(1, D, device=device).half()
    for wrong, told in (
        (x.float(), "expected .tokens, 96. in float16"),
        (x[:, :-1], "expected .tokens, 96. in float16"),
        (x.expand(17, -1), "holds 17 tokens, expected 1 to 16; use the dense FFN"),
        (x[:0], "holds 0 tokens"),
    ):
        with pytest.raises(ValueError, match=told):
            exact_ffn(wrong, weights)
    with pytest.raises(ValueError, match="give the same tokens' residual"):
        predicted_ffn(x, x.expand(2, -1), weights, named)
    plain, fc2 = predictor("f16"), named.fc2_FR
    for named_by, wrong, told in (
        (named, fc2._replace(code_NC=fc2.code_NC[1:]), "code_NC: is"),
        (named, fc2._replace(scale_NB=fc2.scale_NB.float()), "scale_NB: is torch.float32"),
        (plain, torch.zeros(F, R - 1, device=device).half(), "fc2_FR: is"),
        (plain, torch.zeros(F, R, device=device), "fc2_FR: is torch.float32"),
        (plain, fc2, "fc1_RD, fc2_FR: one is a tensor and one Quantized, expected the same kind"),
        (named, plain.fc2_FR, "quantize both or neither"),
    ):
        with pytest.raises(ValueError, match=told):
            predicted_ffn(x, x, weights, named_by._replace(fc2_FR=wrong))


def test_elsewhere_than_on_a_gpu_or_in_the_interpreter_it_says_so(ffn, monkeypatch):
    weights = FFN(*(torch.zeros(16, 16).half() for _ in range(3)))
    monkeypatch.setattr("sparsecast.kernels.ops.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="is on cpu, expected a CUDA device"):
        exact_ffn(torch.zeros(1, 16).half(), weights)
