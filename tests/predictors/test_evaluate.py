"""A model with predictors in the loop, against a forward pass computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.perplexity import perplexity
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import token_batches
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.config import EvaluateConfig
from sparsecast.predictors.evaluate import evaluate, perplexities
from sparsecast.predictors.model_in_loop import exact_in_loop, predictors_in_loop
from sparsecast.predictors.predictor import Predictor

LAYERS, HIDDEN, FFN = 3, 64, 1280


def random_set(seed: int = 0, threshold: float = 0.0) -> PredictorSet:
    generator = torch.Generator().manual_seed(seed)
    layers = [
        Predictor(
            torch.randn(8, HIDDEN, generator=generator).half(),
            torch.randn(FFN, 8, generator=generator).half(),
        )
        for _ in range(LAYERS)
    ]
    return PredictorSet(layers, threshold, None)


def all_active() -> PredictorSet:
    """|x_0| >= 0 holds for every neuron."""
    fc1 = torch.zeros(2, HIDDEN)
    fc1[0, 0], fc1[1, 0] = 1, -1
    return PredictorSet([Predictor(fc1, torch.ones(FFN, 2))] * LAYERS, 0.0, None)


@pytest.fixture(scope="module")
def data(model_folder, corpus):
    _, tokenizer = load_model(str(model_folder), device="cpu")
    docs = assign_splits(read_documents(str(corpus), long_documents="split"))
    quota = {"held-out": 400}
    read = token_batches(docs, tokenizer, quota, seq_len=150, batch_size=3, long_documents="split")
    return list(read)


@pytest.fixture
def model(model_folder):
    return load_model(str(model_folder), device="cpu")[0]


def by_hand(model, ids: torch.Tensor, masks, threshold: float) -> torch.Tensor:
    """Logits of one sequence: each FFN recomputed from its weights behind transformers' attention.

    `masks(layer, residual (T, D))` gives what the predictor keeps.
    """
    handles = []
    for i, layer in enumerate(model.model.layers):
        residual = {}

        def on_norm(_, args, residual=residual):
            residual["x"] = args[0]

        def on_mlp(mlp, args, _, residual=residual, i=i):
            gate, up = mlp.gate_proj(args[0]), mlp.up_proj(args[0])
            fired = torch.where(gate >= threshold, gate, torch.zeros(()))
            if threshold == 0:
                fired = gate.clamp_min(0)
            kept = masks(i, residual["x"][0])
            return mlp.down_proj(fired * up * kept)

        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(on_norm))
        handles.append(layer.mlp.register_forward_hook(on_mlp))
    with torch.inference_mode():
        logits = model(ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def independent_mask(predictors: PredictorSet):
    def mask(layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        fc1, fc2 = (w.double() for w in predictors.layers[layer].weights)
        hidden = (x_TD.half().double() @ fc1.T).clamp_min(0)
        return hidden.half().double() @ fc2.T >= predictors.threshold

    return mask


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_the_mask_in_the_loop_is_the_one_computed_by_hand(model, data, threshold):
    predictors = random_set(threshold=threshold)
    ids = data[0].ids_BS[0][data[0].keep_BS[0]]
    with predictors_in_loop(model, predictors), torch.inference_mode():
        got = model(ids[None]).logits[0]
    want = by_hand(model, ids, independent_mask(predictors), 0.2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert (
            model(ids[None]).logits[0] - want
        ).abs().max() > 1e-2  # hooks are removed, and masks had an effect


def test_exact_equals_dense(model, data):
    """Except for a gate at the threshold, which products of other shapes may round across it."""
    dense = perplexity(model, data)
    with exact_in_loop(model):
        exact = perplexity(model, data)
    assert exact == pytest.approx(dense, rel=1e-4)
    assert perplexity(model, data) == dense


def test_exact_adds_the_biases_of_a_gated_ffn():
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, vocab_size=128, hidden_act="relu")
    config.mlp_bias = True
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(weight, -0.3, 0.3)
    ids = torch.randint(3, 128, (2, 20))
    with torch.inference_mode():
        dense = model(ids).logits
        with exact_in_loop(model):
            torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)


def test_an_all_active_predictor_changes_nothing(model, data):
    dense = perplexity(model, data)
    with predictors_in_loop(model, all_active()):
        assert perplexity(model, data) == pytest.approx(dense, rel=1e-6)


def test_perplexity_is_that_of_every_token_but_the_first(model, data):
    """Padding does not count, and documents are weighted by their tokens."""
    assert any(not batch.keep_BS.all() for batch in data)
    nll, n = 0.0, 0
    for batch in data:
        for ids, keep in zip(batch.ids_BS, batch.keep_BS, strict=True):
            with torch.inference_mode():
                logp = F.log_softmax(model(ids[keep][None]).logits[0].double(), dim=-1)
            target = ids[keep][1:]
            nll -= logp[torch.arange(len(target)), target].sum().item()
            n += len(target)
    assert perplexity(model, data) == pytest.approx(math.exp(nll / n), rel=1e-5)


def test_evaluate_writes_the_keys_of_its_contract(model_folder, corpus, tmp_path, data, capsys):
    random_set().save(tmp_path / "pred")
    path = tmp_path / "evaluate.json"
    cfg = EvaluateConfig(
        model=str(model_folder),
        predictors=tmp_path / "pred",
        corpus=str(corpus),
        tokens=400,
        seq_len=150,
        batch_size=3,
        device="cpu",
        json=path,
    )
    evaluate(cfg)
    result = json.loads(path.read_text())

    asked = {"model": str(model_folder), "corpus": str(corpus), "seq_len": 150}
    asked |= {"long_documents": "split", "skipped": 0, "tokens": 400}
    assert {name: result[name] for name in asked} == asked
    assert set(result) == {*asked, "perplexity", "change", "run"}
    screen = capsys.readouterr().err
    assert f"perplexity on {result['tokens']} held-out tokens of {corpus}\n" in screen
    assert [f"\n{name}: " in screen for name in result["perplexity"]] == [True] * 4
    assert set(result["perplexity"]) == {"dense", "exact", "predicted", "bundle"}
    assert set(result["change"]) == {"exact", "predicted", "bundle"}
    values = result["perplexity"]
    assert result["change"]["predicted"] == pytest.approx(values["predicted"] / values["dense"] - 1)
    assert values["exact"] == pytest.approx(values["dense"], rel=1e-4)
    # In a FATReLU model plain ReLU keeps values between 0 and the threshold.
    assert values["bundle"] != pytest.approx(values["predicted"], rel=1e-4)


def test_bundle_is_mask_and_plain_relu(model, model_folder, corpus, data, tmp_path):
    predictors = random_set()
    predictors.save(tmp_path / "pred")
    result = evaluate(
        EvaluateConfig(
            model=str(model_folder),
            predictors=tmp_path / "pred",
            corpus=str(corpus),
            tokens=400,
            seq_len=150,
            batch_size=3,
            device="cpu",
        )
    )
    nll, n = 0.0, 0
    for batch in data:
        for ids, keep in zip(batch.ids_BS, batch.keep_BS, strict=True):
            logits = by_hand(model, ids[keep], independent_mask(predictors), 0.0)
            nll += F.cross_entropy(logits[:-1], ids[keep][1:], reduction="sum").item()
            n += int(keep.sum()) - 1
    assert result["perplexity"]["bundle"] == pytest.approx(math.exp(nll / n), rel=1e-4)


def test_the_bundle_rounds_matrices_to_f16(model, data):
    """These weights do not fit f16, unlike the fixture's. Vectors are f32 in a bundle."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 1e-3 * torch.rand_like(weight))
    exact = {name: weight.clone() for name, weight in model.named_parameters()}
    perplexities(model, all_active(), data[:1])
    for name, weight in model.named_parameters():
        assert torch.equal(weight, exact[name]) == (weight.dim() == 1)
        if weight.dim() > 1:
            assert torch.equal(weight, exact[name].half().float())


def test_predictors_of_another_model_are_refused(model_folder, corpus, trained, recipe):
    cfg = EvaluateConfig(model=str(model_folder), predictors=recipe.out, corpus=str(corpus))
    with pytest.raises(InputError, match="predictors for 2 layers"):
        evaluate(cfg)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"fingerprint": "0" * 16}, "has fingerprint"),
        (
            {"activation_threshold": 0.1},
            r"trained for fatrelu\(0.1\) in the FFN, but .*fatrelu\(0.2",
        ),
        ({"activation": "relu", "activation_threshold": 0.0}, "trained for relu in the FFN"),
        ({"convention": "ffn-input"}, "trained on the input 'ffn-input'"),
    ],
)
def test_predictors_for_another_use_are_refused(
    changed, told, manifest_of, model_folder, corpus, tmp_path
):
    given = random_set()
    fields = {"fingerprint": Checkpoint(str(model_folder)).fingerprint, **changed}
    replace(given, manifest=manifest_of(given.layers, **fields)).save(tmp_path / "p")
    cfg = EvaluateConfig(
        model=str(model_folder), predictors=tmp_path / "p", corpus=str(corpus), tokens=64
    )
    if told is None:
        evaluate(cfg)
    else:
        with pytest.raises(InputError, match=told):
            evaluate(cfg)
