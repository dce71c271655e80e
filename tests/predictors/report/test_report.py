"""The report's keys, scores, refusals and comparisons."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html import escape, unescape
from importlib.metadata import version

import numpy as np
import pytest
import torch

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, count
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.report.result import by_train_tokens
from sparsecast.predictors.report.run import report, today
from sparsecast.predictors.report.score import score_layers
from sparsecast.predictors.report.wording import verdict

LAYER_KEYS = {
    "layer",
    "rank",
    "recall",
    "predicted_sparsity",
    "true_sparsity",
    "precision",
    "energy_recall",
    "recall_p5",
    "recall_first_token",
    "roc_auc",
    "average_precision",
    "traffic",
    "cascade",
    "exact",
    "oracle",
}
AGAINST_KEYS = {"name", "recipe", "rank", "dtype", "train_tokens", "predictor_bytes", "mean"}
KEYS = {"layers", "mean", "tokens", "predictor_bytes", "model", "predictor_dtype", "threshold"}
KEYS |= {"perplexity_change", "bundle_perplexity_change", "evaluated_on", "against"}
KEYS |= {"corpus", "date", "version", "command", "verdict"}


def no_nan(text: str) -> float:
    raise AssertionError(f"{text} in JSON")


@pytest.fixture
def edited(synthetic, tmp_path, edit_store):
    """Copy the synthetic store, passing each shard's tensors through a function."""
    return lambda change: edit_store(synthetic, tmp_path / "edited", change).folder


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
    assert result["against"] == []


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


def test_tails_cover_single_tokens_and_first_tokens(cfg, trained, synthetic):
    result = report(cfg)
    first_T = torch.cat(
        [synthetic.tokens("held-out", i)[1] == 0 for i in range(len(synthetic.shards("held-out")))]
    )
    assert first_T.sum() == 2
    for layer, predictor in enumerate(trained.layers):
        batches = list(layer_batches(synthetic, "held-out", layer))
        predicted_TF = torch.cat([predictor.logits(x_TD) >= 0 for x_TD, _ in batches])
        active_TF = torch.cat([active_TF for _, active_TF in batches])
        recalls = [count(p, a).recall for p, a in zip(predicted_TF, active_TF, strict=True)]
        row = result["layers"][layer]
        assert row["recall_p5"] == pytest.approx(
            np.percentile(recalls, 5, method="inverted_cdf"), abs=1e-4
        )
        assert row["recall_p5"] < row["recall"]
        assert row["recall_first_token"] == (
            count(predicted_TF[first_T], active_TF[first_T]).recall
        )


def test_without_a_first_token_there_is_no_recall_on_it(cfg, edited):
    def later(tensors):
        tensors["position"] += 1

    result = report(replace(cfg, activations=edited(later)))
    assert {row["recall_first_token"] for row in (*result["layers"], result["mean"])} == {None}


def test_a_layer_where_one_class_is_absent_has_no_auc(cfg, edited):
    """Without active neurons recall is 1, and means skip null values."""

    def silence(tensors):
        tensors["layer.0.mask"].zero_()

    copy = edited(silence)
    result = report(replace(cfg, activations=copy))
    assert result["layers"][0]["roc_auc"] is None
    assert result["layers"][0]["average_precision"] is None
    assert result["layers"][0]["recall_p5"] == 1.0
    assert result["layers"][0]["recall"] == 1.0
    assert result["mean"]["roc_auc"] == result["layers"][1]["roc_auc"]
    assert ActivationStore(copy).manifest.tokens() == 8_000


def test_nothing_is_reported_where_nothing_fires(cfg, edited):
    def silence(tensors):
        for layer in (0, 1):
            tensors[f"layer.{layer}.mask"].zero_()

    with pytest.raises(InputError, match="nothing fires in any layer on 1,000 tokens"):
        report(replace(cfg, activations=edited(silence)))
    assert not cfg.out.exists()


@pytest.mark.parametrize("name", ["layer.0.x", "layer.1.mask", "position"])
def test_a_flipped_bit_is_not_scored(cfg, synthetic, tmp_path, flipped, name):
    folder = flipped(synthetic.folder, tmp_path / "acts", "held-out-00001.safetensors", name)
    with pytest.raises(InputError, match=rf"held-out-00001\.safetensors: damaged, {name} has"):
        report(replace(cfg, activations=folder))
    assert not cfg.out.exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"activation": "fatrelu", "activation_threshold": 0.5},
            r"activation relu, not fatrelu\(0",
        ),
        ({"convention": "layer-input"}, "input residual-before-ffn-norm, not layer-input"),
        ({"ffn_matrices": 2}, "number of FFN matrices 3, not 2"),
    ],
)
def test_activations_recorded_for_another_use_are_refused(
    cfg, synthetic, tmp_path, edit_store, fields, told
):
    other = edit_store(synthetic, tmp_path / "acts", lambda _: None, **fields)
    with pytest.raises(InputError, match=f"another use than {other.folder} was recorded.*{told}"):
        report(replace(cfg, activations=other.folder))


def test_calibration_is_not_held_out(cfg, synthetic, tmp_path):
    folder = shutil.copytree(synthetic.folder, tmp_path / "acts")
    shutil.copy(folder / "calibration-00000.safetensors", folder / "held-out-00000.safetensors")
    with pytest.raises(InputError, match=r"held-out-00000\.safetensors: damaged or of another"):
        report(replace(cfg, activations=folder))


def test_swapped_folders_are_refused(cfg):
    with pytest.raises(InputError, match="holds predictors .* which --predictors takes; expected"):
        report(replace(cfg, activations=cfg.predictors, predictors=cfg.activations))
    with pytest.raises(InputError, match="holds activations .* which --activations takes; expect"):
        report(replace(cfg, predictors=cfg.activations))


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


def test_the_report_shows_the_bundles_perplexity_and_the_text(cfg, tmp_path, capsys):
    path = tmp_path / "evaluate.json"
    change = {"exact": 0.0, "predicted": 0.0123, "bundle": 0.0246}
    path.write_text(json.dumps({"tokens": 5000, "corpus": "<my> [b]text", "change": change}))
    result = report(replace(cfg, evaluation=path))

    assert result["bundle_perplexity_change"] == 0.0246
    assert result["evaluated_on"] == "5,000 held-out tokens of <my> [b]text"
    said = (
        "on 5,000 held-out tokens of <my> [b]text: +1.23% with the model's own activation "
        "(predicted) and +2.46% as PowerInfer computes it (bundle)."
    )
    assert said in capsys.readouterr().err
    assert said in (cfg.out / "report.md").read_text()
    page = (cfg.out / "report.html").read_text()
    assert escape(said) in page
    assert "<b>+2.46%</b>" in page


def test_an_evaluation_without_a_bundle_is_reported(cfg, tmp_path):
    """Of a model that PowerInfer cannot run."""
    path = tmp_path / "evaluate.json"
    path.write_text('{"corpus": "c", "change": {"predicted": 0.0123, "bundle": null}}')
    result = report(replace(cfg, evaluation=path))

    assert result["bundle_perplexity_change"] is None
    said = "(predicted). There is none for PowerInfer (bundle), which cannot run this model."
    assert said in (cfg.out / "report.md").read_text()
    page = (cfg.out / "report.html").read_text()
    assert said in page
    assert "as PowerInfer computes it" not in page


def test_every_page_states_its_origin_and_is_reproducible(cfg, monkeypatch):
    monkeypatch.setattr("sparsecast.predictors.report.run.today", lambda: "2031-05-06")
    result = report(cfg)
    files = ("report.json", "report.md", "report.html")
    first = {name: (cfg.out / name).read_bytes() for name in files}
    names = f"--predictors {cfg.predictors} --activations {cfg.activations}"
    assert result["command"] == f"sparsecast report {names}"
    assert (result["date"], result["version"]) == ("2031-05-06", version("sparsecast"))
    for name in ("report.md", "report.html"):
        text = first[name].decode()
        for what in (result["corpus"], "2031-05-06", result["version"], names, result["verdict"]):
            assert what in unescape(text), (name, what)
    other = cfg.out.with_name("elsewhere")
    report(replace(cfg, out=other, json=other / "numbers.json"))
    assert first == {name: (other / name).read_bytes() for name in files}


def test_the_date_is_that_of_source_date_epoch(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert today() == "2001-09-09"
    for wrong in ("", "-1", "1e9", "9" * 400):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(InputError, match="SOURCE_DATE_EPOCH='.*expected the seconds since"):
            today()


@pytest.mark.parametrize(
    ("traffic", "exact", "said"),
    [
        (0.268, 0.42, "Worth it: decoding reads 0.268 of the dense FFN's bytes, 0.64 times the"),
        (0.37, 0.42, "Worth it: decoding"),
        (0.38, 0.42, "Not worth it: decoding reads 0.380 of the dense FFN's bytes, 0.90 times"),
        (1.2, 1.0, "Not worth it: decoding reads 1.200"),
    ],
)
def test_the_verdict_weighs_traffic_against_no_predictor(traffic, exact, said):
    sentence = verdict({"mean": {"traffic": traffic, "exact": exact, "recall": 0.95}})
    assert sentence.startswith(said)
    assert ("misses 5.0% of the neurons that fire" in sentence) == said.startswith("Worth")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"change": 3}',
        '{"change": {"predicted": "x"}}',
        '{"change": {"predicted": NaN}}',
        '{"change": {"predicted": 1e999}}',
        '{"change": {"predicted": true}}',
        '{"change": {"predicted": -3}}',
        "[",
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_an_evaluation_without_a_change_is_refused_by_name(cfg, tmp_path, text):
    path = tmp_path / "evaluate.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"evaluate\.json"):
        report(replace(cfg, evaluation=path))


def test_an_evaluation_of_tasks_alone_asks_for_a_corpus(cfg, tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text('{"model": "m", "tasks": {}}')
    with pytest.raises(InputError, match="and with --corpus beside --tasks"):
        report(replace(cfg, evaluation=path))


def test_predictors_of_another_model_are_refused(cfg, acts):
    with pytest.raises(InputError, match="predictors of this model|fingerprint"):
        report(replace(cfg, activations=acts.folder))


def test_other_predictors_stand_side_by_side(cfg, trained, variant, tmp_path):
    more = variant("more <b>", offset=0.05, train_tokens=3_000, recipe="reference")
    foreign = tmp_path / "foreign"
    PredictorSet(load_predictors(more).layers, 0.5, None).save(foreign)

    result = report(replace(cfg, against=[more, cfg.predictors, foreign]))
    own, first, second = result["against"]

    assert [entry["name"] for entry in (own, first, second)] == ["pred", "more <b>", "foreign"]
    assert [entry["recipe"] for entry in (own, first, second)] == ["default", "reference", None]
    assert [entry["train_tokens"] for entry in (own, first, second)] == [6_000, 3_000, None]
    assert own["mean"] == result["mean"]
    assert own["predictor_bytes"] == result["predictor_bytes"]
    assert (first["rank"], first["dtype"]) == (32, "f16")
    assert first["mean"] == report(replace(cfg, predictors=more))["mean"]
    assert first["mean"]["recall"] > own["mean"]["recall"]
    assert second["mean"]["recall"] < first["mean"]["recall"], "its own threshold"
    assert set(first) == AGAINST_KEYS
    assert set(first["mean"]) == LAYER_KEYS


def test_predictors_that_differ_in_training_tokens_are_grouped(cfg, variant):
    folders = [variant(f"p{n}", train_tokens=n, recipe="mine") for n in (4_000, 1_000, 2_000)]
    result = report(replace(cfg, against=folders))
    (shared, entries), *others = by_train_tokens(result["against"]).items()
    assert others == []
    assert shared == "mine, rank 32, f16"
    assert [entry["train_tokens"] for entry in entries] == [1_000, 2_000, 4_000]
    markdown, html = ((cfg.out / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert re.findall(r"^\| (\d,000) \|", markdown, re.M) == ["1,000", "2,000", "4,000"]
    assert html.count("<svg") == 4
    assert "How much training data is enough" in html


def test_a_second_report_replaces_the_first_and_nothing_else(cfg, monkeypatch):
    cfg = replace(cfg, json=cfg.out / "numbers.json")
    report(cfg)
    report(cfg)
    assert {path.name for path in cfg.out.iterdir()} == {
        "report.json", "report.md", "report.html", "numbers.json", "run.json",
    }  # fmt: skip
    (cfg.out / "notes.txt").write_text("mine")
    monkeypatch.setattr("sparsecast.predictors.report.run.score_layers", None)
    with pytest.raises(InputError, match="holds other files"):
        report(cfg)
    assert (cfg.out / "notes.txt").read_text() == "mine"


def test_others_of_another_model_are_refused_before_anything_is_scored(
    cfg, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("sparsecast.predictors.report.run.score_layers", None)
    strange, longer = tmp_path / "strange", tmp_path / "longer"
    PredictorSet(trained.layers, 0.0, replace(trained.manifest, fingerprint="f" * 16)).save(strange)
    PredictorSet([*trained.layers, trained.layers[0]], 0.0, None).save(longer)
    with pytest.raises(InputError, match="strange: was trained for"):
        report(replace(cfg, against=[strange]))
    with pytest.raises(InputError, match="longer: has predictors for 3 layers"):
        report(replace(cfg, against=[longer]))
    assert not cfg.out.exists()


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_rankings_do_not_depend_on_the_size_of_the_weights(trained, synthetic, threshold):
    def ranking(power: int) -> list[float]:
        layers = [
            Predictor(layer.fc1_RD.float(), layer.fc2_FR.float() * 2.0**power)
            for layer in trained.layers
        ]
        scores = score_layers(PredictorSet(layers, threshold * 2.0**power, None), synthetic, "p")
        return [score.values[name] for score in scores for name in ("roc_auc", "average_precision")]

    assert ranking(-50) == ranking(40) == pytest.approx(ranking(0), abs=1e-3)
