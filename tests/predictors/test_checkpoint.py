"""PRED folders: what is written is read, and what is hostile is refused with its name."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch

from sparsecast.collect.errors import InputError
from sparsecast.predictors.checkpoint import PredictorSet, check_belongs, load_predictors
from sparsecast.predictors.mlp import Predictor


class Code:
    def __reduce__(self):
        return (print, ("the pickle ran code",))


def write(folder, value, name="model_0.pt"):
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name)


def weights(rank=4, hidden=8, width=16) -> dict[str, torch.Tensor]:
    return {"fc1.weight": torch.randn(rank, hidden), "fc2.weight": torch.randn(width, rank)}


def test_a_set_survives_its_folder(trained, recipe):
    again = load_predictors(recipe.out)

    assert again.manifest == trained.manifest
    assert again.threshold == trained.threshold == 0.0
    for one, two in zip(trained.layers, again.layers, strict=True):
        assert two.fc1_RD.dtype == two.fc2_FR.dtype == torch.float16
        assert torch.equal(one.fc1_RD, two.fc1_RD)
        assert torch.equal(one.fc2_FR, two.fc2_FR)


def test_files_hold_no_more_than_their_tensors(tmp_path):
    """A slice of a stacked weight must not drag the stack into the file."""
    fc1, fc2 = torch.randn(100, 4, 8).half(), torch.randn(100, 16, 4).half()
    PredictorSet([Predictor(fc1[3], fc2[3])], 0.0, None).save(tmp_path / "pred")
    assert (tmp_path / "pred" / "model_0.pt").stat().st_size < 4_000


def test_a_folder_of_another_tool_has_no_manifest(tmp_path):
    write(tmp_path, weights())
    (tmp_path / "config.json").write_text('{"sparse_threshold": 0.5}')
    loaded = load_predictors(tmp_path)
    assert loaded.manifest is None
    assert loaded.threshold == 0.5


@pytest.mark.parametrize(
    "value",
    [
        {**weights(), "fc2.bias": torch.zeros(16)},
        {"fc1.weight": torch.randn(4, 8)},
        {"fc1.weight": torch.randn(4, 8), "fc2.weight": torch.randn(16, 5)},
        {"fc1.weight": torch.randn(4), "fc2.weight": torch.randn(16, 4)},
        {"fc1.weight": torch.full((4, 8), float("nan")), "fc2.weight": torch.randn(16, 4)},
        {"fc1.weight": torch.randn(4, 8), "fc2.weight": torch.full((16, 4), float("inf"))},
        weights(rank=0),
        [1, 2],
        torch.randn(3),
    ],
    ids=["bias", "no fc2", "ranks differ", "vector", "NaN", "infinity", "empty", "list", "tensor"],
)
def test_files_that_are_no_predictor_are_refused_by_name(tmp_path, value):
    write(tmp_path, value)
    with pytest.raises(InputError, match="model_0.pt"):
        load_predictors(tmp_path)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    write(tmp_path, {**weights(), "x": Code()})
    with pytest.raises(InputError, match="model_0.pt"):
        load_predictors(tmp_path)
    (tmp_path / "model_0.pt").write_bytes(pickle.dumps(Code()))
    with pytest.raises(InputError, match="model_0.pt"):
        load_predictors(tmp_path)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_truncated_file_is_refused(tmp_path, keep):
    write(tmp_path, weights())
    path = tmp_path / "model_0.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="model_0.pt"):
        load_predictors(tmp_path)


def test_a_gap_is_named(tmp_path):
    write(tmp_path, weights())
    write(tmp_path, weights(), "model_2.pt")
    with pytest.raises(InputError, match="model_1.pt is missing"):
        load_predictors(tmp_path)


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="sparsecast train"):
        load_predictors(tmp_path)


@pytest.mark.parametrize("threshold", ['"0.5"', "true", "null", "[0]", "NaN", "Infinity"])
def test_a_threshold_that_is_no_number_is_refused(tmp_path, threshold):
    write(tmp_path, weights())
    (tmp_path / "config.json").write_text(f'{{"sparse_threshold": {threshold}}}')
    with pytest.raises(InputError, match="sparse_threshold"):
        load_predictors(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "has 3"),
        ({"hidden_size": 65}, r"\(R, 65\)"),
        ({"ffn_width": 201}, r"\(201, R\)"),
        ({"fingerprint": "f" * 16}, "fingerprint"),
    ],
)
def test_predictors_of_another_model_are_refused(trained, change, message):
    right = {
        "layers": 2,
        "hidden_size": 64,
        "ffn_width": 200,
        "fingerprint": "0" * 16,
        "model": "this one",
    }
    check_belongs(trained, "here", **right)
    with pytest.raises(InputError, match=message):
        check_belongs(trained, "here", **{**right, **change})


def test_a_manifest_of_another_version_is_refused(trained, tmp_path):
    assert trained.manifest is not None
    newer = replace(trained.manifest, format_version=99)
    PredictorSet(trained.layers, 0.0, newer).save(tmp_path / "pred")
    with pytest.raises(InputError, match="format version 99"):
        load_predictors(tmp_path / "pred")


def test_weights_are_scored_as_the_file_will_hold_them(tmp_path):
    """PowerInfer's converter rounds to f16 whatever the repository has."""
    fc1 = torch.full((4, 8), 1.0001)
    write(tmp_path / "p", {"fc1.weight": fc1, "fc2.weight": torch.ones(16, 4)})
    assert torch.equal(load_predictors(tmp_path / "p").layers[0].fc1_RD, fc1.half())
    write(tmp_path / "p", {"fc1.weight": 1e5 * fc1, "fc2.weight": torch.ones(16, 4)})
    with pytest.raises(InputError, match="beyond 65504"):
        load_predictors(tmp_path / "p")
    write(tmp_path / "p", {"fc1.weight": [1], "fc2.weight": torch.ones(16, 4)})
    with pytest.raises(InputError, match="something else than float tensors"):
        load_predictors(tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtypes": None}, "damaged"),
        ({"dtypes": [["f16"], "f16"]}, "damaged"),
        ({"dtypes": ["f16"]}, "manifest.json is of 1"),
        ({"dtypes": ["q4_0", "q4_0"]}, "q4_0 cannot hold these values"),
        ({"recipe": None}, "damaged"),
        ({"ranks": [1, 1]}, r"says ranks \[1, 1\], but the files have"),
    ],
)
def test_a_manifest_that_lies_is_refused(trained, recipe, tmp_path, change, match):
    copy = tmp_path / "p"
    copy.mkdir()
    for path in recipe.out.glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    made = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(made | change))
    with pytest.raises(InputError, match=match):
        load_predictors(copy)


def test_a_manifest_whose_format_cannot_have_these_rows_is_refused(trained, recipe, tmp_path):
    for path in recipe.out.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    made = json.loads((tmp_path / "manifest.json").read_text())
    made |= {"dtypes": ["q8_0", "f16"], "ranks": [16, 32]}
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    write(tmp_path, {"fc1.weight": torch.ones(16, 64), "fc2.weight": torch.ones(200, 16)})
    with pytest.raises(InputError, match=r"in blocks of 32, but fc1 is \(16, 64\)"):
        load_predictors(tmp_path)
