"""A folder in another one's place is told from one that is missing, and its place is named."""

from __future__ import annotations

import json

import pytest

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.folders import KINDS, check_folder_kind, folder_kind
from sparsecast.core.models.checkpoint import read_config
from sparsecast.core.text.corpus_files import local_files
from sparsecast.export.bundle import bundle_file
from sparsecast.predictors.checkpoint import load_predictors

FILES = {
    "activations": ("manifest.json", '{"shard_tokens": {}}'),
    "predictors": ("model_0.pt", ""),
    "bundle": ("x.powerinfer.gguf", ""),
    "report": ("report.json", "{}"),
    "model": ("config.json", '{"model_type": "llama"}'),
}
READERS = {
    "activations": ActivationStore,
    "predictors": load_predictors,
    "bundle": bundle_file,
    "model": read_config,
    "text": lambda path: local_files(str(path)),
}


@pytest.fixture
def folders(tmp_path):
    """One of each kind."""
    for kind, (name, text) in FILES.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("wanted", READERS)
def test_every_reader_names_what_it_was_given(folders, wanted):
    for kind in set(FILES) - {wanted}:
        assert folder_kind(folders / kind) == kind
        with pytest.raises(InputError) as told:
            READERS[wanted](folders / kind)
        assert str(told.value) == (
            f"{folders / kind}: holds {KINDS[kind]}; expected {KINDS[wanted]}"
        )


@pytest.mark.parametrize("wanted", ["activations", "predictors", "bundle", "model"])
def test_the_folder_around_one_and_a_file_in_it_are_led_there(folders, wanted):
    with pytest.raises(InputError, match=rf"holds none itself, .*such as {folders / wanted}$"):
        READERS[wanted](folders)
    with pytest.raises(InputError, match=rf"is a file, expected its folder; give .*/{wanted}$"):
        check_folder_kind(folders / wanted / FILES[wanted][0], wanted)


def test_what_is_nothing_of_ours_is_left_to_the_reader(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    (tmp_path / "config.json").write_text(json.dumps({"sparse_threshold": 0}))
    for wanted in KINDS:
        check_folder_kind(tmp_path, wanted)
        check_folder_kind(tmp_path / "nowhere", wanted)
        check_folder_kind(tmp_path / "manifest.json", wanted)
