"""What cannot be done with a mixture of experts is refused in one line that says what can."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from sparsecast.collect.inspect import InspectConfig
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.inspect import inspect
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.kernels.in_models.sparsify import sparsify_model
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.predictor import Predictor
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.plan import make_plan
from tests.tools.mixtures import LAYERS, D, E, F, write_mixture


@pytest.fixture(scope="module", params=["mixtral", "smallthinker"])
def mixture(request, tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("mixture") / "m"
    return write_mixture(folder, request.param, model_folder)


@pytest.fixture
def of_experts(manifest_of, tmp_path):
    layers = [Predictor(torch.randn(32, D), torch.randn(F, 32)).stored() for _ in range(LAYERS * E)]
    manifest = manifest_of(layers, experts=E, activation="relu", activation_threshold=0.0)
    PredictorSet(layers, 0.0, manifest).save(tmp_path / "pred")
    return tmp_path / "pred"


def refusal(action) -> str:
    with pytest.raises(InputError, match="is a mixture of experts") as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_export_says_why_and_what_works(mixture, of_experts, tmp_path):
    config = ExportConfig(model=str(mixture), predictors=of_experts, out=tmp_path / "bundle")
    text = refusal(lambda: export(config))
    assert "PowerInfer's engine has dense FFNs alone" in text
    assert text.endswith("collect, train, report and evaluate work")
    assert not (tmp_path / "bundle").exists()


def test_kernels_and_prosparse_training_refuse_it(mixture, tmp_path):
    model, _ = load_model(str(mixture), device="cpu")
    assert "kernels" in refusal(lambda: sparsify_model(model, policy="exact"))
    config = SparsifyConfig(
        model=str(mixture), corpus="builtin", out=tmp_path / "o", device="cpu", seq_len=64
    )
    assert "give a dense model" in refusal(lambda: make_plan(config))


def test_a_bundle_is_not_of_a_mixture(mixture, bundle_folder):
    config = VerifyConfig(bundle=bundle_folder, model=str(mixture))
    assert "no bundle is of one" in refusal(lambda: verify(config))


def test_a_dense_model_refuses_predictors_of_experts(model_folder, of_experts, tmp_path):
    config = ExportConfig(model=str(model_folder), predictors=of_experts, out=tmp_path / "bundle")
    with pytest.raises(InputError, match="for 4 experts per layer, but .* a dense FFN per layer"):
        export(config)


def test_inspect_names_layer_and_expert(of_experts, tmp_path, capsys):
    inspect(InspectConfig(path=of_experts, json=tmp_path / "i.json"))
    rows = json.loads((tmp_path / "i.json").read_text())["layers"]
    assert [(row["layer"], row["expert"]) for row in rows] == [
        (i, e) for i in range(LAYERS) for e in range(E)
    ]
    assert "2, expert 3" in capsys.readouterr().err


@pytest.mark.parametrize("experts", [5, -1, 1.5, "4", True, None])
def test_a_manifest_of_another_number_of_experts_is_refused(experts, of_experts, tmp_path, sealed):
    """12 predictors do not divide into layers of 5."""
    copy = sealed(shutil.copytree(of_experts, tmp_path / "copy"), experts=experts)
    with pytest.raises(InputError, match="experts makes no sense"):
        inspect(InspectConfig(path=copy))


def test_a_manifest_of_a_dense_model_has_no_word_of_experts(manifest_of, tmp_path):
    layers = [Predictor(torch.randn(32, D), torch.randn(F, 32)).stored()]
    PredictorSet(layers, 0.0, manifest_of(layers)).save(tmp_path / "pred")
    assert "experts" not in json.loads((tmp_path / "pred" / "manifest.json").read_text())
    stated = replace(manifest_of(layers), experts=1)
    PredictorSet(layers, 0.0, stated).save(tmp_path / "one")
    assert (tmp_path / "one" / "model_0_0.pt").is_file()
