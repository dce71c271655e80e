"""Options of a report on the trained predictors, and variants to compare with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.config import ReportConfig
from sparsecast.predictors.predictor import Predictor


@pytest.fixture
def cfg(synthetic, recipe, trained, tmp_path) -> ReportConfig:
    return ReportConfig(
        predictors=recipe.out, activations=synthetic.folder, out=tmp_path / "report"
    )


@pytest.fixture
def variant(trained, tmp_path):
    """Write the trained predictors with another recipe, and fc2 shifted by `offset`."""

    def write(name: str, *, offset: float = 0.0, **changes) -> Path:
        layers = [
            Predictor(layer.fc1_RD, layer.fc2_FR.float() + offset, "f16")
            for layer in trained.layers
        ]
        manifest = replace(
            trained.manifest,
            dtypes=["f16"] * len(layers),
            recipe={**trained.manifest.recipe, **changes},
        )
        PredictorSet(layers, 0.0, manifest).save(tmp_path / name)
        return tmp_path / name

    return write
