"""One threshold in place of many: the folded model against one that has a threshold per neuron.

Shape letters: L layers, F FFN width.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.families import family_of
from sparsecast.core.models.loading import set_activation
from sparsecast.core.models.recorder import Recorder
from sparsecast.sparsify.thresholds import fold_thresholds
from tests.tools.dense_families import random_model

WIDTH = 32


def build(family, dtype=torch.float64):
    return random_model(family, num_hidden_layers=3, vocab_size=64).to(dtype).eval()


def run(model, ids):
    """(logits, the mask of each layer)."""
    masks = []
    with torch.inference_mode(), Recorder(model, lambda _layer, _x, x1: masks.append(x1 != 0)):
        return model(ids).logits, masks


def with_thresholds(model, thresholds):
    """A copy in which neuron j of layer l keeps what reaches thresholds[l][j], by hooks."""
    model = copy.deepcopy(model)
    set_activation(model, ActivationRule("relu"))
    family = family_of(model.config, "model")
    for layer, threshold_F in zip(family.decoder_layers(model), thresholds, strict=True):
        layer.get_submodule(family.gate or family.up).register_forward_hook(
            lambda _module, _args, g, t=threshold_F: g * (g >= t.to(g.dtype))
        )
    return model


@pytest.mark.parametrize("family", ["llama", "llama-biased", "qwen3", "gemma2", "opt", "falcon"])
@pytest.mark.parametrize("per", ["layer", "neuron"])
def test_the_folded_model_computes_the_same(family, per):
    model = build(family)
    shape = (3, 1) if per == "layer" else (3, WIDTH)
    thresholds_LF = torch.exp2(torch.empty(shape, dtype=torch.float64).uniform_(-7, 0))
    ids = torch.randint(3, 64, (2, 40))
    logits, masks = run(with_thresholds(model, thresholds_LF), ids)
    dense, _ = run(with_thresholds(model, torch.zeros(3, 1)), ids)

    common = fold_thresholds(model, thresholds_LF)
    set_activation(model, ActivationRule("fatrelu", common))
    folded, found = run(model, ids)

    assert (folded - logits).abs().max() < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(found, masks, strict=True))
    assert (dense - logits).abs().max() > 1e-3  # the thresholds matter
    assert all(0.1 < mask.double().mean() < 0.9 for mask in masks)


def test_the_threshold_is_a_power_of_two_in_the_middle():
    model = build("llama")
    before = copy.deepcopy(model)
    thresholds = [torch.tensor(0.02), torch.full((WIDTH,), 0.1), torch.tensor([0.3])]

    common = fold_thresholds(model, thresholds)

    middle = (0.02 * 0.1 * 0.3) ** (1 / 3)
    assert math.log2(common).is_integer()
    assert middle / math.sqrt(2) <= common <= middle * math.sqrt(2)
    gate, was = (m.model.layers[2].mlp.gate_proj.weight for m in (model, before))
    torch.testing.assert_close(gate, was * (common / 0.3), rtol=1e-6, atol=0)  # 0.3 in float32
    attention, was = (m.model.layers[2].self_attn.q_proj.weight for m in (model, before))
    assert torch.equal(attention, was)


def test_float32_weights_are_rounded_once():
    model = build("llama", torch.float32)
    exact = copy.deepcopy(model).double()
    thresholds_LF = torch.rand(3, WIDTH) + 0.01

    assert fold_thresholds(model, thresholds_LF) == fold_thresholds(exact, thresholds_LF)

    for (name, weight), want in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(weight, want.float()), name


def test_no_threshold_at_all_leaves_the_model_alone():
    model = build("opt")
    before = copy.deepcopy(model.state_dict())

    assert fold_thresholds(model, torch.zeros(3, WIDTH)) == 0

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("thresholds", "match"),
    [
        (torch.ones(2, WIDTH), "got 2 layers, but the model has 3"),
        (torch.ones(3, WIDTH + 1), r"layer 0 has shape \(33,\), expected \(32,\) or one value"),
        (torch.tensor([[0.1], [math.nan], [0.1]]), "layer 1 has one that is negative or not finit"),
        (torch.tensor([[0.1], [0.1], [-0.1]]), "layer 2 has one that is negative"),
        (torch.tensor([[0.1], [0.1], [0.0]]), "layer 2 has 32 of zero beside others"),
    ],
)
def test_thresholds_that_cannot_be_folded_change_nothing(thresholds, match):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(ValueError, match=match):
        fold_thresholds(model, thresholds)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_experts_are_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=1, intermediate_size=16, num_local_experts=2)
    )
    with pytest.raises(InputError, match="is a mixture of experts"):
        fold_thresholds(model, torch.ones(1, 16))
