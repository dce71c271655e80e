"""ReLU² and BitNet's RMS norm of x1: every form of the FFN against float64 written out."""

from __future__ import annotations

import pytest
import torch

from sparsecast.kernels.ops import active_list, down, gate, gate_up
from sparsecast.kernels.ops.ffn import (
    FFN,
    PredictorWeights,
    exact_ffn,
    exact_reference,
    predicted_ffn,
    predicted_reference,
)

D, F, R = 64, 45, 16
EPS = 0.02
"""As large as mean squares of x1 here, so that it counts."""
FORMS = ["gate", "no gate", "biases", "norm"]
CASES = [
    (form, tokens, (torch.float16, torch.bfloat16)[(i + j) % 2])
    for i, form in enumerate(FORMS)
    for j, tokens in enumerate((1, 3, 16))
]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    monkeypatch.setattr(down, "ONE_TOKEN_GROUPS", 2)
    monkeypatch.setitem(down.CONFIG, "GROUPS", 2)


@pytest.fixture
def ffn(matrix, banded):
    def make(form, dtype) -> FFN:
        first, second, third = (matrix(F, D, dtype) for _ in range(3))
        if form in ("no gate", "biases"):
            biases = [banded(torch.randn(n).to(dtype)) for n in (F, D)]
            return FFN(None, first, second, *(biases if form == "biases" else ()), act="relu2")
        if form == "norm":
            norm = banded((torch.rand(F) * 2 - 0.5).to(dtype))
            return FFN(first, second, third, x1_norm_F=norm, act="relu2", x1_norm_eps=EPS)
        return FFN(first, second, third, act="relu2")

    return make


@pytest.fixture
def predictor(banded):
    """Weights that name `predicted_TF` for inputs of one coordinate per token, beyond doubt."""

    def make(predicted_TF) -> tuple[PredictorWeights, torch.Tensor]:
        tokens, f = predicted_TF.shape
        fc2_FR = torch.zeros(f, R)
        fc2_FR[:, :tokens] = predicted_TF.T * 2.0 - 1
        weights = (banded(w.half()) for w in (torch.eye(R, D), fc2_FR))
        return PredictorWeights(*weights, 0.1), banded(torch.eye(tokens, D))

    return make


def gates(x_TD: torch.Tensor, ffn: FFN) -> torch.Tensor:
    """(T, F) float64, as the dense model rounds them."""
    first = ffn.up_FD if ffn.gate_FD is None else ffn.gate_FD
    bias = 0 if ffn.up_bias_F is None else ffn.up_bias_F.double()
    return (x_TD.double() @ first.double().T + bias).to(x_TD.dtype).double()


def fires(x_TD: torch.Tensor, ffn: FFN) -> torch.Tensor:
    return gates(x_TD, ffn) > 0


def by_hand(x_TD: torch.Tensor, ffn: FFN, predicted_TF: torch.Tensor | int = 1) -> torch.Tensor:
    """The dense FFN, with nothing rounded but the gate, (T, D) float64."""
    x1_TF = gates(x_TD, ffn).clamp(min=0) ** 2 * predicted_TF
    if ffn.gate_FD is not None:
        x1_TF = x1_TF * (x_TD.double() @ ffn.up_FD.double().T)
    if ffn.x1_norm_F is not None:
        mean_T1 = (x1_TF**2).mean(1, keepdim=True)
        x1_TF = ffn.x1_norm_F.double() * (x1_TF / (mean_T1 + ffn.x1_norm_eps).sqrt())
    y_TD = x1_TF @ ffn.down_FD.double()
    return y_TD if ffn.down_bias_D is None else y_TD + ffn.down_bias_D.double()


@pytest.mark.parametrize(("form", "tokens", "dtype"), CASES, ids=str)
def test_both_paths_are_the_ffn(form, tokens, dtype, ffn, predictor, banded, near):
    weights, x = ffn(form, dtype), banded(torch.randn(tokens, D).to(dtype))
    y, union = exact_ffn(x, weights)
    assert y.dtype == dtype
    near(y, by_hand(x, weights))
    assert union == fires(x, weights).any(0).sum()

    predicted = torch.rand(tokens, F) < 0.5
    named, z = predictor(predicted)
    y, union = predicted_ffn(x, z, weights, named)
    near(y, by_hand(x, weights, predicted.to(x.device)))
    assert union == predicted.any(0).sum()


@pytest.mark.parametrize("form", FORMS)
def test_the_references_are_the_formula(form, ffn, predictor, banded):
    weights, x = ffn(form, torch.float16), banded(torch.randn(5, D).half())
    y, union = exact_reference(x, weights)
    assert torch.equal(y, by_hand(x, weights).half())
    assert union == fires(x, weights).any(0).sum()
    predicted = torch.rand(5, F) < 0.5
    named, z = predictor(predicted)
    y, union = predicted_reference(x, z, weights, named)
    assert torch.equal(y, by_hand(x, weights, predicted.to(x.device)).half())
    assert union == predicted.any(0).sum()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_x1_is_rounded_once(dtype, tokens, matrix, banded):
    """Bit for bit: the square of the rounded gate, in float32."""
    x, first = banded(torch.randn(tokens, D).to(dtype)), matrix(F, D, dtype)
    act, fired = gate.gate(x, first, None, 0.0)

    listed = gate_up.gate_up(x, fired, gate_up.DenseGate(act), None, relu_up=False, squared=True)

    row, x1 = active_list.unpacked(listed)
    assert torch.equal(x1.to(dtype), act[row.long()].float().square().to(dtype))
    assert torch.equal(x1.float(), x1.to(dtype).float())


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_square_beyond_float16_is_finite_behind_a_small_up(tokens, predictor, banded, near):
    """300² is above 65504, and up makes 900 of it; in the dense model it is infinite."""
    gates, up = torch.zeros(F, D), torch.zeros(F, D)
    gates[:, 0], up[:, 1] = 300, 0.01
    weights = FFN(*(banded(w.half()) for w in (gates, up, torch.randn(F, D) / F)), act="relu2")
    x = banded(torch.ones(tokens, D).half())

    y, _ = exact_ffn(x, weights)
    assert y.isfinite().all()
    near(y, by_hand(x, weights))
    named, z = predictor(torch.ones(tokens, F))
    near(predicted_ffn(x, z, weights, named)[0], by_hand(x, weights))


@pytest.fixture
def listed(banded):
    """A list of `total` of f neurons, a third of whose x1 are zero."""

    def make(f, total, tokens, dtype):
        row = torch.randperm(f)[:total].sort().values
        x1 = (torch.randn(total, tokens) * 4).to(dtype)
        x1[::3] = 0
        count, ticket = banded(torch.tensor(total, dtype=torch.int32)), banded(torch.zeros(8).int())
        if tokens == 1:
            entry = torch.full((f + 1,), -1)
            entry[:total] = row << 32 | x1[:, 0].float().view(torch.int32).long() & 0xFFFFFFFF
            entry[-1] = total
            return active_list.EntryList(banded(entry), count, ticket)
        places = torch.empty(f, dtype=torch.int32)
        values = torch.empty(f, tokens, dtype=dtype)
        places[:total], values[:total] = row, x1
        return active_list.BatchList(banded(places), banded(values), count, ticket)

    return make


@pytest.mark.parametrize("total", [0, 1, 33, 300])
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.bfloat16), (3, torch.float16)], ids=str)
def test_down_norms_over_every_neuron(tokens, dtype, total, listed, banded, near):
    """The mean is over all f; weights of the norm and of down are read where a neuron is listed,
    and every run gives the same bits."""
    f, d = 400, 130
    weight, norm = (banded(torch.randn(*s).to(dtype)) for s in ((f, d), (f,)))
    bias = banded(torch.randn(d).to(dtype))
    chosen = listed(f, total, tokens, dtype)
    row, x1 = active_list.unpacked(chosen)
    x1_TF = torch.zeros(tokens, f, dtype=torch.float64, device=weight.device)
    x1_TF[:, row.long()] = x1.double().T
    scale = ((x1_TF**2).mean(1, keepdim=True) + EPS) ** -0.5
    want = (x1_TF * scale * norm.double()) @ weight.double() + bias.double()
    unread = torch.ones(f, dtype=torch.bool).scatter(0, row.long().cpu(), False)
    weight[unread], norm[unread] = torch.nan, torch.nan

    got = down.down(chosen, weight, bias, norm, EPS)

    near(got, want)
    assert torch.allclose(down.reference(chosen, weight, bias, norm, EPS), want)
    assert not chosen.ticket_C.any()
    assert torch.equal(down.down(chosen, weight, bias, norm, EPS), got)


def test_a_nan_stays_in_its_token(ffn, banded, near):
    weights, x = ffn("norm", torch.float16), banded(torch.randn(3, D).half())
    clean = x.clone()
    x[-1, 5] = torch.nan

    y, _ = exact_ffn(x, weights)

    assert y[-1].isnan().all()
    near(y[:-1], by_hand(clean, weights)[:-1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x1_norm_F": torch.zeros(F - 1).half()}, r"x1_norm_F: is \(44,\), expected \(45,\)"),
        ({"x1_norm_F": torch.zeros(F)}, "x1_norm_F: is torch.float32 on"),
        ({"x1_norm_eps": -1.0}, "x1_norm_eps: got -1.0, expected a number >= 0"),
    ],
)
def test_a_norm_that_does_not_fit_is_refused(change, told, ffn, device):
    change = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=told):
        exact_ffn(
            torch.zeros(1, D, device=device).half(), ffn("norm", torch.float16)._replace(**change)
        )


def test_torch_compile_takes_it_without_a_break(ffn, banded):
    weights, x = ffn("norm", torch.float16), banded(torch.randn(2, D).half())
    compiled = torch.compile(lambda x: exact_ffn(x, weights)[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), exact_ffn(x, weights)[0])
