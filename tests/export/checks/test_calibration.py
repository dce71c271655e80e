"""What verify makes of predictors that decide or cost otherwise than their calibration says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.calibration import (
    bound_of,
    calibrated,
    check_decisions,
    check_perplexity,
    measure,
)
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.fired import Drawn, Rates
from sparsecast.export.engine.protocol import chunks_of, held_out_documents, joined, losses
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.predictor import Predictor

LAYERS, T = 3, 0.2


@pytest.fixture(scope="module")
def signs(tmp_path_factory, model_folder, predictors) -> PredictorSet:
    """Predictors that let a neuron through where its gate is positive: exact but for what lies
    between 0 and FATReLU's threshold."""
    weights = load_file(model_folder / "model.safetensors")
    layers = []
    for i in range(LAYERS):
        norm_D = weights[f"model.layers.{i}.post_attention_layernorm.weight"].float()
        gate_FD = weights[f"model.layers.{i}.mlp.gate_proj.weight"].float()
        fc1_RD = torch.cat([torch.diag(norm_D), -torch.diag(norm_D)])
        layers.append(Predictor(fc1_RD, torch.cat([gate_FD, -gate_FD], dim=1)).stored())
    made = load_predictors(predictors).manifest
    assert made is not None
    manifest = replace(
        made,
        dtypes=["f16"] * LAYERS,
        ranks=[128] * LAYERS,
        calibration=[{"recall": 0.99, "predicted_sparsity": 0.5, "true_sparsity": 0.6}] * LAYERS,
        recipe={"calibration_tokens": 600},
    )
    return PredictorSet(layers, 0.0, manifest)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_folder, signs):
    """Export the predictors with their layers in another order, or changed; their folder, and so
    its checksums, is as a training that made them would have written it."""

    def run(change=lambda layers: layers) -> Path:
        folder = tmp_path_factory.mktemp("signs")
        replace(signs, layers=change(list(signs.layers))).save(folder / "p")
        cfg = ExportConfig(model=str(model_folder), predictors=folder / "p", out=folder / "b")
        return export(cfg).parent

    return run


@pytest.fixture(scope="module")
def good(exported) -> Path:
    return exported()


@pytest.fixture(scope="module")
def file(good) -> GGUFFile:
    return GGUFFile(bundle_file(good))


@pytest.fixture(scope="module")
def ids_NS(file, corpus):
    tokenizer = tokenizer_of(file)
    return chunks_of(joined(held_out_documents(str(corpus), tokenizer, 512)), tokenizer, 512)


def swapped(layers: list[Predictor]) -> list[Predictor]:
    return [layers[0], layers[2], layers[1]]


def zeroed(layers: list[Predictor]) -> list[Predictor]:
    zeros = (torch.zeros_like(weight) for weight in layers[1].weights)
    return [layers[0], Predictor(*zeros), layers[2]]


def shuffled(layers: list[Predictor]) -> list[Predictor]:
    fc1_RD, fc2_FR = layers[2].weights
    return [*layers[:2], Predictor(fc1_RD, fc2_FR.roll(1, 0))]


def silent(layers: list[Predictor]) -> list[Predictor]:
    """Nothing is let through: negative sums of what is never negative."""
    fc1_RD, fc2_FR = layers[0].weights
    return [Predictor(fc1_RD, -fc2_FR.abs()), *layers[1:]]


def verified(bundle: Path, model: Path, corpus: Path, **options) -> dict[str, tuple[bool, str]]:
    cfg = VerifyConfig(bundle=bundle, model=str(model), corpus=str(corpus), tokens=512, **options)
    return {check.name: (check.ok, check.detail) for check in verify(cfg).checks}


def test_right_predictors_pass(good, model_folder, corpus):
    found = verified(good, model_folder, corpus)

    assert all(ok for ok, _ in found.values()), found
    assert "as calibrated" in found["decisions"][1]
    assert "by their calibration" in found["perplexity"][1]


def test_two_layers_swapped_are_named_though_every_checksum_fits(exported, model_folder, corpus):
    found = verified(exported(swapped), model_folder, corpus)

    assert {name for name, (ok, _) in found.items() if not ok} <= {"decisions", "perplexity"}
    ok, detail = found["decisions"]
    assert not ok
    assert "layer 1: recall" in detail
    assert "layer 2: recall" in detail
    assert "layer 0" not in detail


@pytest.mark.parametrize(
    ("change", "layer"), [(zeroed, 1), (shuffled, 2), (silent, 0)], ids=lambda v: str(v)[:20]
)
def test_a_layer_that_decides_blindly_is_named(exported, signs, ids_NS, change, layer):
    damaged = GGUFFile(bundle_file(exported(change)))

    decisions, _ = measure(damaged, T, ids_NS)
    check = check_decisions(decisions, signs.manifest, ids_NS.numel())

    assert not check.ok
    assert check.detail.startswith(f"layer {layer}: recall")
    assert sum(f"layer {i}:" in check.detail for i in range(LAYERS)) == 1
    assert abs(decisions[layer].rates.informed) < 0.05


def test_decisions_are_those_of_the_model_itself(file, signs, model_folder, ids_NS):
    """Against transformers: what the predictors see and which neurons fire, by hooks."""
    model, _ = load_model(str(model_folder), device="cpu", dtype="float32")
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        for name, module in (
            ("x", layer.post_attention_layernorm),
            ("x1", layer.mlp.down_proj),
        ):
            module.register_forward_pre_hook(
                lambda _, args, key=(name, i): seen.update({key: args[0].flatten(0, 1)})
            )
    with torch.no_grad():
        model(ids_NS)

    decisions, own_NS = measure(file, T, ids_NS)

    for i, found in enumerate(decisions):
        fired_TF = seen["x1", i] != 0
        through_TF = signs.layers[i].logits(seen["x", i]) >= 0
        recall = (through_TF & fired_TF).sum() / fired_TF.sum()
        false = (through_TF & ~fired_TF).sum() / (~fired_TF).sum()
        assert found.rates.recall == pytest.approx(recall.item(), abs=2e-3)
        assert found.rates.false == pytest.approx(false.item(), abs=2e-3)
        assert found.true_sparsity == pytest.approx(1 - fired_TF.float().mean().item(), abs=2e-3)
        assert found.predicted_sparsity == pytest.approx(
            1 - through_TF.float().mean().item(), abs=2e-3
        )
        assert 0 < found.error < 0.05
    with torch.no_grad():
        scored = model(ids_NS).logits[:, 64:-1].log_softmax(-1)
    want_NS = -scored.gather(-1, ids_NS[:, 65:, None])[..., 0]
    assert own_NS.mean().item() == pytest.approx(want_NS.mean().item(), abs=1e-2)


def test_a_standard_error_is_that_of_other_texts(file):
    """The spread over many texts of 256 tokens each is about what one of them states."""
    torch.manual_seed(4)
    found = [measure(file, T, torch.randint(3, 500, (2, 128)))[0][1] for _ in range(12)]
    spread = torch.tensor([d.rates.informed for d in found]).std().item()
    stated = sum(d.error for d in found) / len(found)
    assert 0.4 < spread / stated < 2.5


def test_draws_have_the_rates_that_were_asked_for(file, ids_NS):
    """1 and 1 is everything active; 1 and 0 is the model itself."""
    everything = losses(Drawn(file, T, [Rates(1.0, 1.0)] * LAYERS).logits, ids_NS)
    dense = losses(lambda ids: Emulator(file).logits(ids, all_active=True), ids_NS)
    assert torch.equal(everything, dense)
    exact = losses(Drawn(file, T, [Rates(1.0, 0.0)] * LAYERS).logits, ids_NS)
    assert torch.allclose(exact, measure(file, T, ids_NS)[1], atol=1e-4)


def test_the_bound_grows_with_what_calibration_misses(file, ids_NS):
    bundle_NS = losses(Emulator(file).logits, ids_NS)
    _, own_NS = measure(file, T, ids_NS)
    few, many = (
        bound_of(file, T, [Rates(recall, 0.1)] * LAYERS, ids_NS, bundle_NS, own_NS)
        for recall in (1.0, 0.2)
    )
    assert 0.002 <= few < many


def test_calibrations_are_read_as_rates(signs, file, ids_NS):
    decisions, _ = measure(file, T, ids_NS)
    said = {"recall": 0.9, "predicted_sparsity": 0.7, "true_sparsity": 0.8}
    manifest = replace(signs.manifest, calibration=[said] * LAYERS)
    # 0.3 let through, 0.18 of them rightly: 0.12 of the 0.8 that are silent.
    assert calibrated(manifest, decisions)[0] == pytest.approx(Rates(0.9, 0.15))
    impossible = {"recall": 1.0, "predicted_sparsity": 1.0, "true_sparsity": 0.5}
    manifest = replace(signs.manifest, calibration=[impossible] * LAYERS)
    assert calibrated(manifest, decisions)[0] == Rates(1.0, 0.0)


def nll(value: float) -> torch.Tensor:
    return torch.full((4, 63), value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("bound", "allowed", "ok", "told"),
    [
        (0.20, None, True, "cost +10.52%, at most +20.00%"),
        (0.05, None, False, "more than +5.00%, the cost of as many random misses"),
        (0.05, 0.2, True, "at most +20.00% allowed by --max-perplexity-increase"),
        (0.20, 0.1, False, "at most +10.00% allowed by --max-perplexity-increase"),
        (None, None, True, "no calibration"),
    ],
)
def test_a_cost_is_held_against_its_bound(bound, allowed, ok, told):
    check = check_perplexity(nll(1.1), nll(1.0), nll(0.99), bound=bound, allowed=allowed)
    assert check.ok is ok
    assert told in check.detail
    assert f"the model itself {math.exp(0.99):.4f} (+11.63%), 512 held-out tokens" in check.detail


def test_a_perplexity_that_is_no_number_fails():
    check = check_perplexity(nll(math.nan), nll(1.0), None, bound=None, allowed=None)
    assert not check.ok


def test_without_a_manifest_decisions_are_told_alone(file, ids_NS):
    decisions, _ = measure(file, T, ids_NS)
    check = check_decisions(decisions, None, ids_NS.numel())
    assert check.ok
    assert "no calibration" in check.detail


@pytest.mark.parametrize("share", [-0.01, math.nan, math.inf])
def test_an_increase_that_is_none_is_refused(share, tmp_path):
    with pytest.raises(InputError, match="--max-perplexity-increase"):
        VerifyConfig(bundle=tmp_path, max_perplexity_increase=share)
