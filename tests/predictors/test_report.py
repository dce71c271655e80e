"""The report: exactly the contract's keys, the file's own numbers, and one page without links."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from sparsecast.collect.errors import InputError
from sparsecast.collect.splits import SPLITS
from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.config import ReportConfig
from sparsecast.predictors.data import layer_batches
from sparsecast.predictors.metrics import Counts, count
from sparsecast.predictors.mlp import Predictor
from sparsecast.predictors.report import report

LAYER_KEYS = {
    "layer",
    "rank",
    "recall",
    "predicted_sparsity",
    "true_sparsity",
    "precision",
    "energy_recall",
    "roc_auc",
    "traffic",
    "cascade",
    "exact",
    "oracle",
}
KEYS = {"layers", "mean", "tokens", "predictor_bytes", "model", "predictor_dtype", "threshold"}
KEYS |= {"perplexity_change"}


def no_nan(text: str) -> float:
    raise AssertionError(f"{text} in JSON")


@pytest.fixture
def cfg(synthetic, recipe, trained, tmp_path) -> ReportConfig:
    return ReportConfig(
        predictors=recipe.out, activations=synthetic.folder, out=tmp_path / "report"
    )


def test_the_json_has_the_contracts_keys_and_no_nan(cfg, tmp_path):
    returned = report(replace(cfg, json=tmp_path / "copy.json"))
    text = (cfg.out / "report.json").read_text()
    result = json.loads(text, parse_constant=no_nan)

    assert set(result) == KEYS
    assert all(set(row) == LAYER_KEYS for row in (*result["layers"], result["mean"]))
    assert [row["layer"] for row in result["layers"]] == [0, 1]
    assert result == json.loads((tmp_path / "copy.json").read_text()) == returned
    assert result["tokens"] == 1_000
    assert result["predictor_bytes"] == 2 * 2 * 32 * (64 + 200)
    assert result["threshold"] == 0.0
    assert result["perplexity_change"] is None
    assert result["mean"]["energy_recall"] is None


def test_scores_are_those_of_the_held_out_split(cfg, trained, synthetic):
    result = report(cfg)
    for layer, predictor in enumerate(trained.layers):
        want = Counts(0, 0, 0, 0)
        for x_TD, active_TF in layer_batches(synthetic, "held-out", layer):
            want = want.plus(count(predictor.logits(x_TD) >= 0, active_TF))
        row = result["layers"][layer]
        for name in ("recall", "precision", "predicted_sparsity", "true_sparsity"):
            assert row[name] == getattr(want, name)
        assert row["oracle"] == pytest.approx(1 - row["true_sparsity"])
        assert row["roc_auc"] > 0.95
    assert result["mean"]["recall"] == pytest.approx(
        sum(row["recall"] for row in result["layers"]) / 2
    )


def test_a_layer_where_one_class_is_absent_has_no_auc(tmp_path, cfg, synthetic):
    """Nothing fired: recall is 1 and the means skip what is null."""
    copy = tmp_path / "silent"
    copy.mkdir()
    for path in synthetic.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file, save_file

    for split in SPLITS:
        for path in copy.glob(f"{split}-*.safetensors"):
            tensors = load_file(path)
            tensors["layer.0.mask"].zero_()
            save_file(tensors, path)
    result = report(replace(cfg, activations=copy))
    assert result["layers"][0]["roc_auc"] is None
    assert result["layers"][0]["recall"] == 1.0
    assert result["mean"]["roc_auc"] == result["layers"][1]["roc_auc"]
    assert ActivationStore(copy).manifest.tokens() == 8_000


def test_predicting_nothing_is_a_precision_of_one(cfg, tmp_path):
    silent = Predictor(torch.randn(4, 64), torch.zeros(200, 4))
    PredictorSet([silent, silent], 1.0, None).save(tmp_path / "pred")
    result = report(replace(cfg, predictors=tmp_path / "pred"))
    assert result["mean"]["recall"] == 0.0
    assert result["mean"]["precision"] == 1.0
    assert result["mean"]["predicted_sparsity"] == 1.0
    json.loads((cfg.out / "report.json").read_text(), parse_constant=no_nan)


def test_the_change_in_perplexity_comes_from_evaluate(cfg, tmp_path):
    path = tmp_path / "evaluate.json"
    path.write_text('{"change": {"exact": 0.0, "predicted": 0.0123, "bundle": 0.02}}')
    assert report(replace(cfg, evaluation=path))["perplexity_change"] == 0.0123
    assert "1.23" in (cfg.out / "report.html").read_text()


@pytest.mark.parametrize("text", ["{}", '{"change": 3}', '{"change": {"predicted": "x"}}', "["])
def test_an_evaluation_without_the_number_is_named(cfg, tmp_path, text):
    path = tmp_path / "evaluate.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"evaluate\.json"):
        report(replace(cfg, evaluation=path))


def test_the_page_stands_alone(cfg):
    report(cfg)
    page = (cfg.out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "prefers-color-scheme: dark" in page
    assert (cfg.out / "report.md").read_text().count("\n| ") >= 3


def test_predictors_of_another_model_are_refused(cfg, acts):
    with pytest.raises(InputError, match="predictors of this model|fingerprint"):
        report(replace(cfg, activations=acts.folder))
