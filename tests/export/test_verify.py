"""What verify runs on and writes; test_corruptions.py has what makes it fail."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.folders import check_activation_folder, check_card
from sparsecast.export.checks.gpu_split import check_gpu_split
from sparsecast.export.checks.predictors import check_predictors
from sparsecast.export.checks.run import VerifyResult
from sparsecast.export.config import VerifyConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.verify import verify


@pytest.fixture
def check(bundle, model_folder, corpus):
    """Run verify on the (damaged) copy."""

    def run(**options: object) -> VerifyResult:
        defaults = {"model": str(model_folder), "corpus": str(corpus), "tokens": 512}
        return verify(VerifyConfig(bundle=bundle, **{**defaults, **options}))

    return run


def failures(result: VerifyResult) -> dict[str, str]:
    assert not result.ok
    return {c.name: c.detail for c in result.checks if not c.ok}


def test_a_sound_bundle_passes_and_writes_its_result(check, corpus, tmp_path, capsys):
    result = check(json=tmp_path / "verify.json")

    assert result.ok
    value = json.loads((tmp_path / "verify.json").read_text())
    assert value["ok"] is True
    assert value["engine"] is None
    assert value["text"] == f"512 held-out tokens of {corpus}"
    screen = capsys.readouterr().err
    assert f"\nperplexities, logits and tokens were computed on {value['text']}\n" in screen
    assert {"logits", "perplexity", "values attn_q"} <= {c["name"] for c in value["checks"]}
    assert all(c.keys() == {"name", "ok", "detail"} for c in value["checks"])


def test_the_model_is_found_through_the_manifest(check):
    assert "values ffn_up" in {c.name for c in check(model=None).checks}


def test_values_stay_unchecked_without_the_model(check, bundle, sealed):
    sealed(bundle / "predictor", model="/gone")

    result = check(model=None)

    assert result.ok
    assert "not checked" in next(c.detail for c in result.checks if c.name == "values")


def test_another_model_fails(check, bundle, model_folder, tmp_path):
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (other / "config.json").write_text(json.dumps(config))

    assert "llama.rope.freq_base" in failures(check(model=str(other)))["header"]


def test_a_folder_without_a_bundle_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match="holds 0 files"):
        verify(VerifyConfig(bundle=tmp_path))


def test_a_result_that_cannot_be_written_is_told_before_any_check(check, tmp_path):
    with pytest.raises(InputError, match="--json: .* cannot be written"):
        check(json=tmp_path)


def test_a_missing_engine_is_the_users_error(bundle, tmp_path):
    with pytest.raises(InputError, match="no executable bin/perplexity"):
        verify(VerifyConfig(bundle=bundle, engine=tmp_path))


@pytest.mark.parametrize("kind", ["file", "folder", "FIFO", "loop"])
@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("predictor", "predictor folder"),
        ("predictor/model_0.pt", "predictor folder"),
        ("activation", "hot and cold"),
        ("activation/activation_1.pt", "hot and cold"),
        ("README.md", "card"),
        (None, "gpu split"),
    ],
)
def test_what_stands_in_the_place_of_another_is_named(name, check, kind, bundle):
    """Never waited for, and never taken for what is not there."""
    file = GGUFFile(bundle_file(bundle))
    path = bundle / (name or f"{file.path.name}.generated.gpuidx")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    {
        "file": path.touch,
        "folder": path.mkdir,
        "FIFO": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
    }[kind]()

    found, _ = check_predictors(file, None, None)
    found += [check_activation_folder(file, bundle / "activation")]
    found += check_gpu_split(file, bundle) + check_card(bundle)

    failed = {c.name: c.detail for c in found if not c.ok}
    if kind == "file" and name == "README.md":
        assert not failed
    else:
        assert set(failed) == {check}
        assert path.name.split(".")[0] in failed[check]
