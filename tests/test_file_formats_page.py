"""docs/file-formats.md names every field of the manifests and the versions of today."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sparsecast.collect.store import store
from sparsecast.core import run_record
from sparsecast.core.run_record import RunRecord
from sparsecast.export.write import gpuidx, writer
from sparsecast.predictors import manifest

PAGE = (Path(__file__).parents[1] / "docs" / "file-formats.md").read_text(encoding="utf-8")
RUN = PAGE.partition("\n## run.json\n")[2].partition("\n## ")[0]
STORE, PREDICTORS = (part.partition("\n## ")[0] for part in PAGE.split("### manifest.json\n")[1:])


@pytest.mark.parametrize(
    ("section", "kind"),
    [(STORE, store.Manifest), (PREDICTORS, manifest.PredictorManifest), (RUN, RunRecord)],
    ids=["activations", "predictors", "run"],
)
def test_every_field_of_a_manifest_is_described(section, kind):
    missing = [field.name for field in fields(kind) if f"`{field.name}`" not in section]
    assert missing == [], f"docs/file-formats.md, {kind.__name__}: add these fields"


def test_the_versions_are_those_of_today():
    assert f"**format version {store.FORMAT_VERSION}**" in PAGE
    assert store.FORMAT_VERSION == manifest.FORMAT_VERSION
    assert f"| `format_version` | {run_record.FORMAT_VERSION} |" in RUN


def test_what_run_json_says_of_versions_and_the_machine_is_described():
    names = {*run_record.versions_of({}), *run_record.this_machine(gpus=False)}
    assert [name for name in sorted(names) if f"`{name}`" not in RUN] == []


@pytest.mark.parametrize(
    "key",
    [writer.KEY_THRESHOLD, writer.KEY_FINGERPRINT, writer.KEY_RECIPE, writer.KEY_ACTIVATION]
    + [writer.KEY_OTHER_TOKENS]
    + [gpuidx.ARCHITECTURE, gpuidx.KEY_BLOCKS, gpuidx.KEY_CAPACITY],
)
def test_every_key_of_ours_is_described(key):
    assert f"`{key}`" in PAGE
