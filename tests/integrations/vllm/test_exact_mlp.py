"""The MLP that vLLM runs with exact FFNs, in Triton's interpreter. `make test-vllm` runs this."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsecast.core.models.activations import ActivationRule
from sparsecast.integrations.vllm import ffn
from sparsecast.integrations.vllm.ffn import SparseAndMul

pytestmark = pytest.mark.vllm

D, F = 64, 256


@pytest.fixture
def models():
    pytest.importorskip("vllm", reason="make test-vllm makes an environment with vLLM")
    from sparsecast.integrations.vllm import models

    return models


def mlp_of(dtype: torch.dtype):
    """What `ExactMLP` reads of vLLM's MLP, on one process."""
    gate_up, down = nn.Linear(D, 2 * F, bias=False), nn.Linear(F, D, bias=False)
    down.reduce_results, down.tp_size, down.input_size_per_partition = True, 1, F
    return SimpleNamespace(gate_up_proj=gate_up.to(dtype), down_proj=down.to(dtype))


RULES = [ActivationRule("relu"), ActivationRule("drelu"), ActivationRule("relu2")]
RULES.append(ActivationRule("fatrelu", 0.1))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_it_computes_what_vllms_does(models, rule, tokens, monkeypatch):
    calls = []
    exact = ffn.exact_ffn
    monkeypatch.setattr(ffn, "exact_ffn", lambda *args: calls.append(1) or exact(*args))
    mlp = mlp_of(torch.bfloat16)
    made = models.ExactMLP(mlp, rule)
    made.transpose()
    x_TD = torch.randn(tokens, D, dtype=torch.bfloat16)
    wide = [linear.weight.double() for linear in (mlp.gate_up_proj, mlp.down_proj)]
    gate_up = (x_TD.double() @ wide[0].T).to(torch.bfloat16).double()
    want = SparseAndMul(rule)(gate_up) @ wide[1].T
    assert (made(x_TD).double() - want).abs().max() <= 1e-2 * want.abs().max()
    assert len(calls) == (tokens <= 16)


def test_weights_load_again_behind_the_transpose(models):
    """As vLLM does where training sends new weights: into the parameters that are there."""
    made = models.ExactMLP(mlp_of(torch.bfloat16), RULES[0])
    made.transpose()
    assert set(made.state_dict()) == {"gate_up_proj.weight", "down_proj.weight"}
    new = torch.randn(D, F, dtype=torch.bfloat16)
    made.down_proj.weight.data.copy_(new)
    assert torch.equal(made.down_proj.weight, new)
    assert made.down_proj.weight.t().is_contiguous()


def test_the_reasons_to_stay_dense(models, monkeypatch):
    def config(**fields):
        model = SimpleNamespace(dtype=fields.pop("dtype", torch.bfloat16))
        return SimpleNamespace(
            **{"quant_config": None, "lora_config": None, "model_config": model, **fields}
        )

    mlp = mlp_of(torch.bfloat16)
    assert models._hindrance(config(), mlp) is None  # the interpreter takes the CPU
    assert "quantized" in models._hindrance(config(quant_config=object()), mlp)
    assert "LoRA" in models._hindrance(config(lora_config=object()), mlp)
    assert "float32" in models._hindrance(config(dtype=torch.float32), mlp)
    biased = mlp_of(torch.bfloat16)
    biased.down_proj.bias = nn.Parameter(torch.zeros(D))
    assert "biases" in models._hindrance(config(), biased)
    monkeypatch.setattr(models, "INTERPRETED", False)
    assert "on cpu" in models._hindrance(config(), mlp)
