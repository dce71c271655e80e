"""The FFN as vLLM holds it, against formulas in float64. Without vLLM, by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sparsecast.core.models.activations import ActivationRule
from sparsecast.integrations.vllm import ffn
from sparsecast.integrations.vllm.ffn import SparseAndMul, by_rows, exact_or_dense

SLOW = pytest.mark.slow
RULES = [ActivationRule(name) for name in ("relu", "drelu", "relu2")]
RULES.append(ActivationRule("fatrelu", 0.3))
D, F = 48, 200
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def x1_of(rule, gate, up):
    gate = gate * (gate >= rule.threshold) if rule.name == "fatrelu" else gate.clamp(min=0)
    gate = gate**2 if rule.name == "relu2" else gate
    return gate * (up.clamp(min=0) if rule.name == "drelu" else up)


def problem(tokens: int, dtype: torch.dtype):
    x_TD = torch.randn(tokens, D)
    gate_up, down = torch.randn(2 * F, D) * D**-0.5, torch.randn(D, F) * F**-0.5
    return [tensor.to(DEVICE, dtype) for tensor in (x_TD, gate_up, down)]


def by_hand(rule, x_TD, gate_up, down_DF):
    gate_TF, up_TF = (x_TD.double() @ gate_up.double().T).chunk(2, -1)
    gate_TF = gate_TF.to(x_TD.dtype).double()
    return x1_of(rule, gate_TF, up_TF) @ down_DF.double().T


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_activation(rule):
    gate_up = torch.randn(5, 2 * F)
    out = SparseAndMul(rule)(gate_up)
    gate, up = gate_up[:, :F].double(), gate_up[:, F:].double()
    torch.testing.assert_close(out.double(), x1_of(rule, gate, up), rtol=1e-6, atol=0)
    assert ((out == 0) == (x1_of(rule, gate, up) == 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_threshold_itself_stays(dtype):
    """vLLM's own FatreluAndMul drops it."""
    at = torch.tensor(0.0741, dtype=dtype)
    below = at.nextafter(torch.tensor(0.0, dtype=dtype))
    gate_up = torch.stack([at, below, *torch.ones(2, dtype=dtype)])
    out = SparseAndMul(ActivationRule("fatrelu", 0.0741))(gate_up)
    assert out.tolist() == [at.item(), 0.0]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "tokens", [1, pytest.param(5, marks=SLOW), 16, pytest.param(17, marks=SLOW)]
)
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)],
    ids=str,
)
def test_exact_and_dense_give_the_ffn(rule, tokens, dtype):
    x_TD, gate_up, down_DF = problem(tokens, dtype)
    y_TD = exact_or_dense(x_TD, gate_up, by_rows(down_DF), rule.name, rule.threshold)
    want = by_hand(rule, x_TD, gate_up, down_DF)
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert (y_TD.double() - want).abs().max() <= limit * want.abs().max()
    assert y_TD.dtype == dtype


@pytest.mark.parametrize(
    ("tokens", "dtype", "rows", "kernels"),
    [
        (1, torch.bfloat16, True, True),
        (16, torch.float16, True, True),
        (17, torch.float16, True, False),
        (0, torch.float16, True, False),
        (4, torch.float32, True, False),
        (4, torch.float16, False, False),
    ],
)
def test_which_of_the_two_runs(tokens, dtype, rows, kernels, monkeypatch):
    """Up to 16 tokens in 16 bits, with rows of the down projection that the kernels can read."""
    calls = []
    exact = ffn.exact_ffn
    monkeypatch.setattr(ffn, "exact_ffn", lambda *args: calls.append(1) or exact(*args))
    x_TD, gate_up, down_DF = problem(tokens, dtype)
    y_TD = exact_or_dense(x_TD, gate_up, by_rows(down_DF) if rows else down_DF, "relu", 0.0)
    assert (len(calls), y_TD.shape) == (int(kernels), x_TD.shape)


def test_rows_keep_shape_and_values():
    down_DF = torch.randn(D, F)
    assert torch.equal(by_rows(down_DF), down_DF)
    assert by_rows(down_DF).t().is_contiguous()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_parts_of_the_neurons_add_up(rule):
    """Tensor parallelism: every process has a part of gate, up and down, and outputs are summed."""
    x_TD, gate_up, down_DF = problem(3, torch.float32)
    gate, up = gate_up.chunk(2)
    parts = [
        exact_or_dense(x_TD, torch.cat([g, u]), by_rows(d), rule.name, rule.threshold)
        for g, u, d in zip(gate.chunk(2), up.chunk(2), down_DF.chunk(2, 1), strict=True)
    ]
    want = by_hand(rule, x_TD, gate_up, down_DF)
    torch.testing.assert_close(sum(parts).double(), want, rtol=1e-5, atol=1e-5)


def test_it_compiles_once_for_every_number_of_tokens():
    """vLLM traces the model with a symbolic number of tokens."""
    _, gate_up, down_DF = problem(1, torch.float32)

    def layer(x_TD):
        y_TD = exact_or_dense(functional.relu(x_TD), gate_up, by_rows(down_DF), "relu", 0.0)
        return y_TD + 1

    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for tokens in (3, 16, 40):
        x_TD = torch.randn(tokens, D, device=DEVICE)
        torch.testing.assert_close(compiled(x_TD), layer(x_TD))
