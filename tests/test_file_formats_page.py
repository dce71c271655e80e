"""docs/file-formats.md names every field of the manifests and the versions of today."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sparsecast.collect.store import store
from sparsecast.export.write import gpuidx, writer
from sparsecast.predictors import manifest

PAGE = (Path(__file__).parents[1] / "docs" / "file-formats.md").read_text(encoding="utf-8")
STORE, PREDICTORS = (part.partition("\n## ")[0] for part in PAGE.split("### manifest.json\n")[1:])


@pytest.mark.parametrize(
    ("section", "kind"),
    [(STORE, store.Manifest), (PREDICTORS, manifest.PredictorManifest)],
    ids=["activations", "predictors"],
)
def test_every_field_of_a_manifest_is_described(section, kind):
    missing = [field.name for field in fields(kind) if f"`{field.name}`" not in section]
    assert missing == [], f"docs/file-formats.md, {kind.__name__}: add these fields"


def test_the_versions_are_those_of_today():
    assert f"**format version {store.FORMAT_VERSION}**" in PAGE
    assert store.FORMAT_VERSION == manifest.FORMAT_VERSION


@pytest.mark.parametrize(
    "key",
    [writer.KEY_THRESHOLD, writer.KEY_FINGERPRINT, writer.KEY_RECIPE, writer.KEY_ACTIVATION]
    + [writer.KEY_OTHER_TOKENS]
    + [gpuidx.ARCHITECTURE, gpuidx.KEY_BLOCKS, gpuidx.KEY_CAPACITY],
)
def test_every_key_of_ours_is_described(key):
    assert f"`{key}`" in PAGE
