"""The stand-in of the Hub for huggingface_hub in this process, and a folder of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, HubStandIn

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.config import ExportConfig
from sparsecast.export.run import export
from sparsecast.integrations.hub.config import PushConfig
from sparsecast.integrations.hub.push import Pushed, push
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.manifest import PredictorManifest
from sparsecast.predictors.predictor import Predictor

LAYERS, HIDDEN, FFN, RANK = 3, 64, 1280, 16
BASE = "someone/base"
"""A model that the stand-in has."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub but for `BASE`, a token for it, and an empty cache."""
    with HubStandIn() as standing:
        standing.add(BASE, {"config.json": b"{}"})
        standing.datasets = {"wikitext", "a/b"}
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", standing.url)
        template = standing.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield standing


@pytest.fixture(scope="session")
def made(tmp_path_factory, model_folder, acts) -> Path:
    """A folder with predictors/, bundle/ and model/; not to be written to."""
    root = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(3)
    layers = [
        Predictor(
            torch.randn(RANK, HIDDEN, generator=generator),
            torch.randn(FFN, RANK, generator=generator),
        ).stored()
        for _ in range(LAYERS)
    ]
    scores = {"recall": 0.9, "predicted_sparsity": 0.6, "true_sparsity": 0.8, "precision": 0.5}
    manifest = PredictorManifest(
        model=str(model_folder),
        fingerprint=Checkpoint(str(model_folder)).fingerprint,
        convention="residual-before-ffn-norm",
        activation="fatrelu",
        activation_threshold=0.2,
        hidden_size=HIDDEN,
        ffn_width=FFN,
        ffn_matrices=3,
        dtypes=["f16"] * LAYERS,
        ranks=[RANK] * LAYERS,
        calibration=[scores] * LAYERS,
        recipe={"corpus": str(acts.manifest.corpus), "recipe": "default", "rank": RANK},
    )
    PredictorSet(layers, 0.0, manifest).save(root / "predictors")
    export(
        ExportConfig(
            model=str(model_folder),
            predictors=root / "predictors",
            out=root / "bundle",
            activations=acts.folder,
        )
    )
    shutil.copytree(model_folder, root / "model")
    held_out = {
        "SiLU original": {"perplexity": 10.0, "sparsity": 0.0},
        "as saved": {"perplexity": 10.5, "sparsity": 0.75},
    }
    facts = {"model": BASE, "model_type": "llama", "corpus": "wikitext", "held_out": held_out}
    (root / "model/sparsify.json").write_text(json.dumps(facts))
    (root / "model/README.md").write_text("# model\n\nTrained by `sparsecast sparsify`.\n")
    return root


@pytest.fixture
def copy_of(made, acts, tmp_path):
    """Copy a folder of `made`, or the activations, that a test may change."""

    def copy(kind: str) -> Path:
        source = acts.folder if kind == "activations" else made / kind
        return Path(shutil.copytree(source, tmp_path / kind))

    return copy


@pytest.fixture
def pushed():
    """Push a folder to me/NAME, NAME being the folder's."""

    def run(folder: Path, **options: object) -> Pushed:
        return push(PushConfig(folder=folder, **{"repo": f"me/{folder.name}", **options}))

    return run
