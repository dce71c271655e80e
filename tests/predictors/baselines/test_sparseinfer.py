"""SparseInfer's rule in a report, against the model's own norm and gate in numpy and scikit-learn.

The norm before the FFN has weights of both signs here: with positive ones alone, leaving them out
would change no sign.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import (
    average_precision_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from sparsecast.cli.main import main
from sparsecast.cli.parser import parse
from sparsecast.cli.stages import STAGES, load
from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.errors import InputError
from sparsecast.predictors.baselines.sparseinfer import agreement, calibrated_threshold
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.config import ReportConfig
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.report.run import report

LAYERS, HIDDEN, FFN = 3, 64, 1280
THRESHOLD = -0.3


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, model_folder, corpus) -> SimpleNamespace:
    """A model with negative norm weights, its store, and random predictors."""
    folder = tmp_path_factory.mktemp("signed")
    model = folder / "model"
    shutil.copytree(model_folder, model)
    weights = load_file(model / "model.safetensors")
    for layer in range(LAYERS):
        weights[f"model.layers.{layer}.post_attention_layernorm.weight"][layer::3] *= -1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    cfg = CollectConfig(
        model=str(model), corpus=str(corpus), out=folder / "acts", tokens=3_000, seq_len=256
    )
    store = collect(cfg)
    generator = torch.Generator().manual_seed(5)
    layers = [
        Predictor(
            torch.randn(8, HIDDEN, generator=generator) / 8,
            torch.randn(FFN, 8, generator=generator) / 8,
        ).stored()
        for _ in range(LAYERS)
    ]
    predictors = PredictorSet(layers, THRESHOLD, None)
    predictors.save(folder / "pred")
    return SimpleNamespace(
        model=model, store=store, weights=weights, predictors=predictors, folder=folder / "pred"
    )


@pytest.fixture
def cfg(recorded, tmp_path) -> ReportConfig:
    return ReportConfig(
        predictors=recorded.folder,
        activations=recorded.store.folder,
        out=tmp_path / "report",
        against=["sign"],
        model=str(recorded.model),
    )


def labeled(store, split, layer) -> tuple[np.ndarray, np.ndarray]:
    """All raw inputs of a split in float64, and its masks."""
    xs, active = zip(*layer_batches(store, split, layer), strict=True)
    return torch.cat(xs).double().numpy(), torch.cat(active).numpy()


def oracle_scores(recorded, split, layer) -> tuple[np.ndarray, np.ndarray]:
    """Sign products of the gate and the FFN's normalized input, and the masks."""
    x, active = labeled(recorded.store, split, layer)
    prefix = f"model.layers.{layer}."
    norm = recorded.weights[prefix + "post_attention_layernorm.weight"].double().numpy()
    gate = recorded.weights[prefix + "mlp.gate_proj.weight"].double().numpy()
    normalized = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * norm
    return np.sign(normalized) @ np.sign(gate).T, active


def recall_wanted(recorded, layer) -> float:
    x, active = labeled(recorded.store, "calibration", layer)
    logits = recorded.predictors.layers[layer].logits(torch.from_numpy(x).half()).numpy()
    return recall_score(active.ravel(), (logits >= THRESHOLD).ravel())


def oracle_threshold(recorded, layer) -> int:
    """The largest whole number that reaches the recall, tried one by one from the top."""
    score, active = oracle_scores(recorded, "calibration", layer)
    wanted, cut = recall_wanted(recorded, layer), HIDDEN
    while (score[active] >= cut).mean() < wanted:
        cut -= 1
    return cut


def test_scores_equal_sign_products_computed_by_hand(recorded, cfg):
    """Each layer is calibrated to its own predictor's recall, which no manifest states."""
    _, entry = report(cfg)["against"]

    assert len({recall_wanted(recorded, layer) for layer in range(LAYERS)}) == LAYERS
    rows = []
    for layer in range(LAYERS):
        score, active = oracle_scores(recorded, "held-out", layer)
        predicted = score >= oracle_threshold(recorded, layer)
        recall = recall_score(active.ravel(), predicted.ravel())
        load, fired = predicted.mean(), active.mean()
        bits = 1 / (3 * 16)  # one bit per gate weight, relative to three matrices of 16 bits
        rows.append(
            {
                "recall": recall,
                "predicted_sparsity": 1 - load,
                "true_sparsity": 1 - fired,
                "precision": precision_score(active.ravel(), predicted.ravel()),
                "roc_auc": roc_auc_score(active.ravel(), score.ravel()),
                "average_precision": average_precision_score(active.ravel(), score.ravel()),
                "traffic": bits + load,
                "cascade": bits + (load + 2 * recall * fired) / 3,
                "exact": (1 + 2 * fired) / 3,
                "oracle": fired,
            }
        )
    for name in rows[0]:
        assert entry["mean"][name] == pytest.approx(np.mean([row[name] for row in rows])), name
    assert entry["mean"]["roc_auc"] > 0.6, "the rule knows something"
    assert entry["predictor_bytes"] == LAYERS * HIDDEN * FFN / 8


@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_threshold_is_the_largest_that_reaches_the_recall(recorded, layer, wanted):
    score, active = oracle_scores(recorded, "calibration", layer)
    prefix = f"model.layers.{layer}."
    norm = recorded.weights[prefix + "post_attention_layernorm.weight"].float()
    gate = recorded.weights[prefix + "mlp.gate_proj.weight"].float()

    cut = calibrated_threshold((gate * norm).sign(), recorded.store, layer, wanted)

    assert (score[active] >= cut).mean() >= wanted
    above = score[score >= cut].min() + 1
    assert (score[active] >= above).mean() < wanted


def test_a_zero_neither_agrees_nor_disagrees():
    sign_FD = torch.tensor([[1.0, -1.0, 0.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])
    x_TD = torch.tensor([[3.0, -0.1, 5.0, 0.0], [-1e-3, 2.0, -7.0, 1.0]], dtype=torch.float16)
    assert agreement(sign_FD, x_TD).tolist() == [[2.0, -1.0], [-1.0, 0.0]]


def test_entries_keep_the_order_given_on_every_page(recorded, cfg, tmp_path):
    for name in ("first", "last"):
        recorded.predictors.save(tmp_path / name)

    result = report(replace(cfg, against=[tmp_path / "first", "sign", tmp_path / "last", "sign"]))

    own, first, sign, last = result["against"]
    assert [entry["name"] for entry in result["against"]] == ["pred", "first", "sign", "last"]
    assert set(sign) == set(own)
    assert set(sign["mean"]) == set(own["mean"])
    assert own["mean"] == first["mean"] == last["mean"]
    assert (sign["recipe"], sign["rank"], sign["train_tokens"]) == ("sign", None, None)
    assert sign["mean"]["rank"] is None
    markdown, html = ((cfg.out / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "| sign | sign | - | 1 bit | - |" in markdown
    assert "<td>1 bit</td>" in html


def test_without_active_neurons_the_threshold_is_above_all_scores(
    recorded, cfg, tmp_path, edit_store
):
    ids, _ = recorded.store.tokens("calibration", 0)

    def silence(tensors):
        for layer in range(LAYERS) if torch.equal(tensors["id"], ids) else ():
            tensors[f"layer.{layer}.mask"].zero_()

    silent = edit_store(recorded.store, tmp_path / "silent", silence)

    _, entry = report(replace(cfg, activations=silent.folder))["against"]

    loads = []
    for layer in range(LAYERS):
        highest = oracle_scores(recorded, "calibration", layer)[0].max()
        loads.append((oracle_scores(recorded, "held-out", layer)[0] > highest).mean())
    assert entry["mean"]["predicted_sparsity"] == pytest.approx(1 - np.mean(loads))


def test_a_folder_called_sign_needs_no_model(recorded, cfg, tmp_path, monkeypatch):
    recorded.predictors.save(tmp_path / "sign")
    monkeypatch.chdir(tmp_path)
    config = load(STAGES["report"].config)
    line = ["--predictors", str(cfg.predictors), "--activations", str(cfg.activations)]
    line += ["--out", "report"]

    values = parse("report", config, None, [*line, "--against", "./sign"])
    own, folder = report(config(**values))["against"]

    assert folder["mean"] == own["mean"]
    both = parse("report", config, None, [*line, "--against", "sign,./sign"])
    assert both["against"] == ["sign", Path("sign")]


def test_another_model_or_none_is_refused_before_anything_is_scored(
    recorded, cfg, model_folder, monkeypatch, capsys
):
    monkeypatch.setattr("sparsecast.predictors.report.run.score_layers", None)
    line = ["report", "--predictors", str(cfg.predictors), "--activations", str(cfg.activations)]
    line += ["--out", str(cfg.out), "--against", "sign"]
    for model, match in (
        ([], "--against sign: needs the recorded model; give --model"),
        (["--model", str(model_folder)], f"--model {model_folder}: is not the model that"),
        (["--model", "./nowhere"], "./nowhere: no such model folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*line, *model])
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert match in error
        assert error.count("\n") == 1
    assert not cfg.out.exists()
    with pytest.raises(InputError, match="give --model"):
        replace(cfg, model=None)
