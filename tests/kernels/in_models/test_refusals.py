"""What cannot be made sparse is told in one line, and the model stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.kernels.in_models.sparse_ffn import SparseFFN
from sparsecast.kernels.in_models.sparsify import sparsify_model
from sparsecast.predictors.checkpoint import PredictorSet

SCORES = {"recall": 1.0, "predicted_sparsity": 0.5}


def refused(model, source, policy, match) -> None:
    with pytest.raises(InputError, match=match) as told:
        sparsify_model(model, source, policy)
    assert "\n" not in str(told.value)
    assert not any(isinstance(module, SparseFFN) for module in model.modules())


def test_policies(make, predictors):
    model = make("llama")
    refused(model, predictors(), "dense", "policy: got 'dense', expected one of exact, predicted")
    refused(model, None, "predicted", "policy: predicted needs predictors")


def test_predictors_of_another_model(make, predictors, model_folder, tmp_path):
    two = predictors()
    refused(make("llama"), PredictorSet(two.layers[:1], 0.0, None), "predicted", "has 2")
    refused(make("llama"), tmp_path, "auto", r"no model_0\.pt")
    wide = load_model(str(model_folder), device="cpu")[0]
    refused(wide, PredictorSet([*two.layers, two.layers[0]], 0.0, None), "exact", "1280")


def test_the_fingerprint_counts_where_the_model_has_a_folder(model_folder, tmp_path, predictors):
    model = load_model(str(model_folder), device="cpu")[0]
    layer = predictors().layers[0]
    wide = type(layer)(layer.fc1_RD, torch.randn(1280, 32).half())
    manifest = predictors(calibration=[SCORES] * 3).manifest
    refused(model, PredictorSet([wide] * 3, 0.0, manifest), "predicted", "fingerprint")
    sparsify_model(model, PredictorSet([wide] * 3, 0.0, None), "predicted")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"activation": "fatrelu", "activation_threshold": 0.1}, r"fatrelu\(0.1\) in the FFN, but"),
        ({"activation": "drelu"}, "trained for drelu in the FFN"),
        ({"convention": "ffn-input"}, "trained on the input 'ffn-input'"),
    ],
)
def test_predictors_for_another_use(changed, match, make, predictors):
    source = predictors(calibration=[SCORES] * 2)
    source = replace(source, manifest=replace(source.manifest, **changed))
    for policy in ("predicted", "auto"):
        refused(make("llama"), source, policy, match)


def test_models_and_layers(make):
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    refused(gpt, None, "exact", "model_type is 'gpt2'")
    silu = make("llama")
    silu.config.hidden_act, silu.model.layers[1].mlp.act_fn = "silu", nn.SiLU()
    refused(silu, None, "exact", "leaves no exact zeros")
    biased = make("llama")
    biased.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.zeros(88))
    refused(biased, None, "exact", r"layer 1 has a bias in mlp\.up_proj")
    meta = make("opt")
    meta.model.decoder.layers[0].fc2.to("meta")
    refused(meta, None, "exact", r"layer 0 has no weights in memory for fc2")
    adapted = make("llama")
    adapted.model.layers[0].mlp.gate_proj = nn.Sequential(adapted.model.layers[0].mlp.gate_proj)
    refused(adapted, None, "exact", r"mlp\.gate_proj as a Sequential")


def test_twice(make):
    model = sparsify_model(make("llama"), None, "exact")
    with pytest.raises(InputError, match="layer 0 is already sparse; load the model again"):
        sparsify_model(model, None, "exact")


def test_a_lost_predictor_input_is_no_silent_number(make, predictors):
    model = sparsify_model(make("llama"), predictors(), "predicted")
    with pytest.raises(RuntimeError, match="the predictor's input is missing"):
        model.model.layers[0].mlp(torch.randn(1, 64))
