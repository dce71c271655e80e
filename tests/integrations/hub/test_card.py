"""The card is one that the Hub and huggingface_hub understand, and its numbers are the folder's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hub_stand_in import metadata_errors
from huggingface_hub import ModelCard, ModelCardData

from sparsecast.core.errors import InputError
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.traffic import traffic_of
from sparsecast.integrations.hub.card import dataset_id
from sparsecast.predictors.checkpoint import load_predictors

KINDS = ("predictors", "activations", "bundle", "model")


def metrics(card: str, split: str) -> dict[str, float]:
    """Values by metric type, as huggingface_hub reads them from the model-index."""
    results = ModelCard(card).data.eval_results or []
    return {r.metric_type: r.metric_value for r in results if r.dataset_split == split}


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_passes_the_hubs_validation_and_a_round_trip(kind, hub, copy_of, pushed):
    text = pushed(copy_of(kind), base_model="someone/base", license="mit").card

    card = ModelCard(text)
    if huggingface_hub.__version__.partition(".")[0] != "1":  # which asks huggingface.co itself
        card.validate()  # by the stand-in's validate-yaml
    assert "POST /api/validate-yaml" in hub.requests
    again = ModelCardData(**card.data.to_dict())
    assert again.to_dict() == card.data.to_dict()
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.license == "mit"
    assert "sparsecast" in card.data.tags
    assert card.data.eval_results


@pytest.mark.parametrize(
    ("kind", "relation", "library", "pipeline"),
    [
        ("predictors", "adapter", "sparsecast", None),
        ("activations", None, "sparsecast", None),
        ("bundle", "quantized", "powerinfer", "text-generation"),
        ("model", "finetune", "sparsecast", "text-generation"),
    ],
)
def test_what_it_is_to_its_base_model(kind, relation, library, pipeline, hub, copy_of, pushed):
    data = ModelCard(pushed(copy_of(kind), base_model="someone/base").card).data
    assert data.base_model == ("someone/base" if relation else None)
    assert data.to_dict().get("base_model_relation") == relation
    assert (data.library_name, data.pipeline_tag) == (library, pipeline)


def test_a_relu_model_loads_in_transformers_and_names_where_it_comes_from(hub, copy_of, pushed):
    folder = copy_of("model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_act": "relu", "hidden_act_param": None, "_name_or_path": "/data/secret/m"}
    (folder / "config.json").write_text(json.dumps(config))

    data = ModelCard(pushed(folder).card).data
    assert (data.library_name, data.base_model) == ("transformers", "someone/base")
    assert data.datasets == ["wikitext"]
    pushed_config = json.loads(hub.repos["me/model"].files["config.json"])
    assert pushed_config == {**config, "_name_or_path": "m"}


def test_scores_of_predictors_are_the_manifests_and_their_traffic_the_bundles(hub, copy_of, pushed):
    """Traffic of predictors alone and of the file with them, by two formulas."""
    scores = metrics(pushed(copy_of("predictors")).card, "calibration")
    assert (scores["recall"], scores["predicted_sparsity"]) == (0.9, 0.6)
    folder = copy_of("bundle")
    file = GGUFFile(next(folder.glob("*.gguf")))
    stored = {name: (entry.type.name, entry.shape) for name, entry in file.entries.items()}
    manifest = load_predictors(folder / "predictor").manifest
    traffic = traffic_of(stored, manifest.calibration).reported
    assert scores["traffic"] == pytest.approx(sum(traffic) / len(traffic), abs=1e-6)
    assert metrics(pushed(folder).card, "calibration") == scores


def test_sparsity_of_activations_is_counted_over_their_masks(hub, copy_of, pushed, acts):
    scores = metrics(pushed(copy_of("activations")).card, "all splits")
    shares = []
    for layer in acts.manifest.layers:
        active = total = 0
        for split, counts in acts.manifest.shard_tokens.items():
            for number in range(len(counts)):
                mask_TP = acts.rows(split, number, layer).mask_TP
                active += sum(int(byte).bit_count() for byte in mask_TP.reshape(-1).tolist())
                total += len(mask_TP) * acts.manifest.ffn_width
        shares.append(1 - active / total)
    assert scores["true_sparsity"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_scores_of_a_sparse_model_are_those_of_the_model_as_saved(hub, copy_of, pushed):
    scores = metrics(pushed(copy_of("model")).card, "held-out")
    assert scores["perplexity"] == 10.5
    assert scores["true_sparsity"] == 0.75
    assert scores["perplexity_change"] == 0.05


def report_of(predictors: Path, folder: Path, **fields: object) -> Path:
    mean = {"recall": 0.87, "predicted_sparsity": 0.55, "true_sparsity": 0.8, "traffic": 0.5}
    own = load_predictors(predictors)
    value = {"mean": {**mean, "exact": 0.45}, "predictor_bytes": own.nbytes, "threshold": 0.0}
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps({**value, "corpus": "builtin", **fields}))
    return folder


def evaluation_in(path: Path) -> Path:
    change = {"exact": 0.0, "predicted": 0.021, "bundle": 0.034}
    value = {"tokens": 2000, "corpus": "builtin", "change": change, "perplexity": {"dense": 5.0}}
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("kind", ["predictors", "bundle"])
def test_a_report_and_an_evaluation_add_held_out_scores(kind, hub, copy_of, pushed, tmp_path):
    folder = copy_of(kind)
    predictors = folder / "predictor" if kind == "bundle" else folder
    report = report_of(predictors, tmp_path / "report")
    evaluation = evaluation_in(tmp_path / "evaluate.json")

    card = pushed(folder, report=report, evaluation=evaluation).card
    scores = metrics(card, "held-out")
    assert scores == {
        "recall": 0.87,
        "predicted_sparsity": 0.55,
        "true_sparsity": 0.8,
        "traffic": 0.5,
        "exact_traffic": 0.45,
        "perplexity_change": 0.021,
        "bundle_perplexity_change": 0.034,
    }
    assert "| change in perplexity as PowerInfer computes it | +3.40% |" in card
    assert "report.json" not in hub.repos[f"me/{kind}"].files


def test_the_text_of_an_evaluation_is_a_name_too(hub, copy_of, pushed, tmp_path):
    path = evaluation_in(tmp_path / "evaluate.json")
    for corpus, name, kind in (("clients/acme", "acme", "acme"), ("a/b:c", "a/b:c", "a/b")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "corpus": corpus}))
        data = ModelCard(pushed(copy_of("predictors"), evaluation=path).card).data
        (result, *_) = [r for r in data.eval_results if r.metric_type == "perplexity_change"]
        assert (result.dataset_name, result.dataset_type, data.datasets) == (name, kind, None)
        shutil.rmtree(tmp_path / "predictors")


def test_those_in_the_folder_count_and_stay_here(hub, copy_of, pushed):
    folder = copy_of("predictors")
    report_of(folder, folder)
    evaluation_in(folder / "evaluate.json")
    assert metrics(pushed(folder).card, "held-out")["perplexity_change"] == 0.021
    assert not {"report.json", "evaluate.json"} & set(hub.repos["me/predictors"].files)


def test_a_report_of_other_predictors_is_refused(hub, copy_of, pushed, tmp_path):
    folder = copy_of("predictors")
    report = report_of(folder, tmp_path / "report", predictor_bytes=1)
    with pytest.raises(InputError, match="is of other predictors, of 1 bytes"):
        pushed(folder, report=report)
    with pytest.raises(InputError, match="--evaluation: is about predictors"):
        pushed(copy_of("model"), evaluation=evaluation_in(tmp_path / "e.json"))


@pytest.mark.parametrize("kind", ["bundle", "model", "predictors"])
def test_a_readme_keeps_its_text_and_its_metadata_wins(kind, hub, copy_of, pushed):
    folder = copy_of(kind)
    body = (folder / "README.md").read_text() if kind != "predictors" else "# mine\n\nText.\n"
    front = "---\nlicense: apache-2.0\nlanguage: en\ntags:\n- mine\nbase_model: other/one\n---\n"
    (folder / "README.md").write_text(front + body)

    card = ModelCard(pushed(folder).card)
    assert body.splitlines()[0] in card.text
    assert card.text.count("\n## Figures\n") == 1
    lines = [line for line in body.splitlines() if "/" not in line]
    assert all(line in card.text for line in lines)
    assert (card.data.license, card.data.language, card.data.base_model) == (
        "apache-2.0",
        "en",
        "other/one",
    )
    assert {"mine", "sparsecast"} <= set(card.data.tags)
    options = ModelCard(pushed(folder, license="mit", base_model="someone/base").card)
    assert (options.data.license, options.data.base_model) == ("mit", "someone/base")


def test_a_readme_that_was_pushed_and_downloaded_can_be_pushed_again(hub, copy_of, pushed):
    folder = copy_of("predictors")
    first = pushed(folder, license="mit", base_model="someone/base").card
    (folder / "README.md").write_text(first)
    assert pushed(folder, license="mit", base_model="someone/base").card == first


def test_metadata_that_is_none_is_refused(hub, copy_of, pushed):
    folder = copy_of("predictors")
    (folder / "README.md").write_text("---\n- a\n- b\n---\ntext\n")
    with pytest.raises(InputError, match=r"README.md: its metadata between the lines --- cannot"):
        pushed(folder)
    (folder / "README.md").write_text("---\na: [\n---\ntext\n")
    with pytest.raises(InputError, match=r"README.md: its metadata between the lines --- cannot"):
        pushed(folder)


def test_the_stand_in_refuses_what_the_hub_refuses():
    """Else the tests above would prove nothing."""
    good = "---\nlicense: mit\nbase_model: a/b\n---\n"
    assert metadata_errors(good) == []
    for wrong in ("license: nonsense", "base_model: /data/x", "tags: one", "model-index: [{}]"):
        assert metadata_errors(f"---\n{wrong}\n---\n"), wrong


@pytest.mark.parametrize(
    ("corpus", "name"),
    [
        ("a/b:c@train", "a/b"),
        ("wikitext", "wikitext"),
        ("builtin", None),
        ("data.jsonl", None),
        ("/data/x", None),
        ("texts/*.txt", None),
        ("train.jsonl#1a2b", None),
    ],
)
def test_which_corpora_are_datasets_of_the_hub(corpus, name):
    assert dataset_id(corpus) == name
