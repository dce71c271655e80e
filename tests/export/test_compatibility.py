"""Predictors of this model, of another one, of nobody known, and a threshold that a config lost."""

from __future__ import annotations

import json
import re
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors


@pytest.fixture
def other(model_folder, tmp_path) -> Path:
    """A model of the same shapes with other weights."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].neg_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def exported(model: Path, predictors: Path, out: Path, **options: object) -> str:
    """The card, in one line."""
    export(ExportConfig(model=str(model), predictors=predictors, out=out, **options))
    return " ".join((out / "README.md").read_text().split())


def verified(bundle: Path, corpus: Path, **options: object) -> dict[str, str]:
    """Details of a bundle that passes."""
    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), tokens=256, **options))
    assert result.ok, [c for c in result.checks if not c.ok]
    return {c.name: c.detail for c in result.checks}


def said(predictors: Path, folder: Path, **change: object) -> Path:
    """The same predictors with another manifest."""
    loaded = load_predictors(predictors)
    replace(loaded, manifest=replace(loaded.manifest, **change)).save(folder)
    return folder


def test_predictors_of_another_model_are_refused_unless_forced(
    other, model_folder, predictors, corpus, tmp_path, capsys
):
    theirs, ours = (Checkpoint(str(m)).fingerprint for m in (model_folder, other))
    with pytest.raises(InputError, match=f"{theirs}.*, but .*{ours}.*accept these with --force"):
        exported(other, predictors, tmp_path / "b")
    assert not (tmp_path / "b").exists()

    card = exported(other, predictors, tmp_path / "b", force=True)

    told = f"(fingerprint {theirs}), but {other} has fingerprint {ours}"
    assert f"## Predictors of another model The predictors were trained for {model_folder}" in card
    assert told in card
    assert f"sparsecast verify . --model {other} --engine" in card
    shown = "".join(capsys.readouterr().err.split())  # lines end where the terminal does
    assert "".join(told.split()) in shown
    detail = verified(tmp_path / "b", corpus, model=str(other))["predictor model"]
    start = f"NOT for this model, exported with --force: trained for {model_folder}"
    assert detail.startswith(f"{start} (fingerprint {theirs})")
    assert ours in detail
    assert verified(tmp_path / "b", corpus)["predictor model"].startswith(start)


def test_a_forced_bundle_is_not_compared_with_the_model_of_its_predictors(
    other, predictors, corpus, tmp_path
):
    exported(other, predictors, tmp_path / "b", force=True)

    details = verified(tmp_path / "b", corpus)

    assert "the file is of another model; give --model" in details["values"]
    assert "values ffn_up" not in details


def test_predictors_of_this_model_are_said_to_be(bundle_folder, corpus, model_folder):
    fingerprint = Checkpoint(str(model_folder)).fingerprint
    assert GGUFFile(bundle_file(bundle_folder)).keys["sparsecast.model_fingerprint"] == fingerprint
    want = f"trained for {model_folder} (fingerprint {fingerprint})"
    assert verified(bundle_folder, corpus)["predictor model"] == want
    assert "another model" not in (bundle_folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"convention": "layer-input"}, "input 'layer-input', but .* 'residual-before-ffn-norm'"),
        (
            {"activation": "relu", "activation_threshold": 0.0},
            r"for relu in .* has fatrelu\(0\.2\)",
        ),
        ({"activation_threshold": 0.3}, r"for fatrelu\(0\.3\).*--activation-threshold 0.3"),
    ],
)
def test_another_input_or_activation_is_refused_unless_forced(
    model_folder, predictors, corpus, bundle_folder, tmp_path, change, reason
):
    strange = said(predictors, tmp_path / "p", **change)
    with pytest.raises(InputError, match=reason):
        exported(model_folder, strange, tmp_path / "b")

    card = exported(model_folder, strange, tmp_path / "b", force=True)

    assert "## Predictors of another model" in card
    details = verified(tmp_path / "b", corpus)
    assert re.search(f"NOT for this model.*{reason}", details["predictor model"])
    told, want = (d["perplexity"].split(";")[0] for d in (details, verified(bundle_folder, corpus)))
    assert told == want  # the model's own T
    assert "no calibration to compare with" in details["decisions"]


@pytest.mark.parametrize("rows", [{"fc1_RD": 32, "fc2_FR": 1280}, {"fc1_RD": 64, "fc2_FR": 1024}])
def test_shapes_are_never_forced(model_folder, predictors, tmp_path, rows):
    loaded = load_predictors(predictors)
    layers = [
        replace(p, fc1_RD=p.fc1_RD[:, : rows["fc1_RD"]], fc2_FR=p.fc2_FR[: rows["fc2_FR"]])
        for p in loaded.layers
    ]
    PredictorSet(layers, 0.0, None).save(tmp_path / "p")
    with pytest.raises(InputError, match=r"needs \(R, 64\) and \(1280, R\)"):
        exported(model_folder, tmp_path / "p", tmp_path / "b", force=True)
    PredictorSet(loaded.layers[:2], 0.0, None).save(tmp_path / "p")
    with pytest.raises(InputError, match="has predictors for 2 layers"):
        exported(model_folder, tmp_path / "p", tmp_path / "b", force=True)


class Network(nn.Module):
    """As a trainer of somebody else's has it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 24, bias=False)
        self.fc2 = nn.Linear(24, 1280, bias=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_published_repository_is_taken_as_it_is(model_folder, corpus, tmp_path, dtype, modern):
    """model_<i>.pt as `Module.state_dict()` gives it, config.json, other files, no manifest."""
    repository = tmp_path / "repository"
    repository.mkdir()
    networks = [Network().to(dtype) for _ in range(3)]
    for i, network in enumerate(networks):
        state = network.state_dict()
        assert isinstance(state, OrderedDict)
        path = repository / f"model_{i}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=modern)
    (repository / "config.json").write_text('{"sparse_threshold": 0.01, "vram": "any"}')
    (repository / "README.md").write_text("# predictors")

    card = exported(model_folder, repository, tmp_path / "b")

    assert (
        "They came without a manifest: their model, their input and their scores are unknown"
        in card
    )
    assert "Ranks [24, 24, 24]" in card
    assert f"sparsecast verify . --model {model_folder}" in card
    file = GGUFFile(bundle_file(tmp_path / "b"))
    assert file.keys["powerinfer.sparse_threshold"] == pytest.approx(0.01)
    for i, network in enumerate(networks):
        for short in ("fc1", "fc2"):
            weight = getattr(network, short).weight.detach()
            assert torch.equal(file.tensor(f"blk.{i}.{short}.weight"), weight.half())
    assert "predictor model" not in verified(tmp_path / "b", corpus, model=str(model_folder))


def test_parameters_are_tensors_too(model_folder, tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(3):
        network = Network().half()
        torch.save(dict(network.named_parameters()), tmp_path / "p" / f"model_{i}.pt")

    exported(model_folder, tmp_path / "p", tmp_path / "b")

    last = GGUFFile(bundle_file(tmp_path / "b")).tensor("blk.2.fc2.weight")
    assert torch.equal(last, network.fc2.weight)


@pytest.fixture
def lost(model_folder, tmp_path) -> Path:
    """MiniCPM-S in llama format: fields of MiniCPM, relu, and no threshold."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "lost"))
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_act_param"]
    config |= {"hidden_act": "relu", "scale_emb": 12}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_lost_threshold_is_told_and_can_be_given(lost, predictors, corpus, tmp_path, capsys):
    """The predictors have been trained with it."""
    own = said(predictors, tmp_path / "p", model=str(lost))
    with pytest.raises(InputError, match="for fatrelu.0.2.*has relu .--activation-threshold 0.2"):
        exported(lost, own, tmp_path / "b")

    card = exported(lost, own, tmp_path / "b", activation_threshold=0.2)

    assert "The model computes fatrelu(0.2); PowerInfer computes plain ReLU" in card
    assert "scale_emb" not in capsys.readouterr().err
    own_rule = verified(tmp_path / "b", corpus)["perplexity"]
    assert own_rule == verified(tmp_path / "b", corpus, activation_threshold=0.2)["perplexity"]
    assert own_rule != verified(tmp_path / "b", corpus, activation_threshold=0.0)["perplexity"]


def test_a_lost_threshold_is_warned_of(lost, predictors, tmp_path, capsys):
    anyones = Path(shutil.copytree(predictors, tmp_path / "anyones"))
    (anyones / "manifest.json").unlink()

    card = exported(lost, anyones, tmp_path / "b")

    assert "MiniCPM-S-1B has 0.03: give it" in " ".join(capsys.readouterr().err.split())
    assert "## Activation" not in card


def test_the_manifest_of_a_forced_bundle_stays_that_of_its_predictors(other, predictors, tmp_path):
    exported(other, predictors, tmp_path / "b", force=True)

    manifest = load_predictors(tmp_path / "b" / "predictor").manifest

    assert manifest == load_predictors(predictors).manifest
