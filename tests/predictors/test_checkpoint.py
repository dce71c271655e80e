"""Predictor folders: writing, reading, and refusing damaged or hostile files by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsecast.core.errors import InputError
from sparsecast.core.models.shape import ModelShape
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_model
from sparsecast.predictors.predictor import Predictor

SCORES = {"recall": 0.9, "predicted_sparsity": 0.5}


class Code:
    def __reduce__(self):
        return (print, ("the pickle ran code",))


def write(folder, value, name="model_0.pt"):
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name)


def weights(rank=4, hidden=8, width=16) -> dict[str, torch.Tensor]:
    return {"fc1.weight": torch.randn(rank, hidden), "fc2.weight": torch.randn(width, rank)}


def test_predictors_survive_saving_and_loading(trained, recipe):
    again = load_predictors(recipe.out)

    assert again.manifest == trained.manifest
    assert again.threshold == trained.threshold == 0.0
    for one, two in zip(trained.layers, again.layers, strict=True):
        assert two.fc1_RD.dtype == two.fc2_FR.dtype == torch.float16
        assert torch.equal(one.fc1_RD, two.fc1_RD)
        assert torch.equal(one.fc2_FR, two.fc2_FR)


def test_files_hold_only_their_tensors(tmp_path):
    """Saving a slice of a stacked weight must not save the stack."""
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


def test_a_missing_layer_is_named(tmp_path):
    write(tmp_path, weights())
    write(tmp_path, weights(), "model_2.pt")
    with pytest.raises(InputError, match="model_1.pt is missing"):
        load_predictors(tmp_path)


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="sparsecast train"):
        load_predictors(tmp_path)


@pytest.mark.parametrize(
    "threshold",
    [
        '"0.5"',
        "true",
        "null",
        "[0]",
        "NaN",
        "Infinity",
        "1e308",
        "-3.5e38",
        "1e-60",
        "1" + "0" * 400,
    ],
)
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
    shape = ModelShape(layers=2, hidden_size=64, ffn_width=200, ffn_matrices=3)
    fingerprint = change.pop("fingerprint", "0" * 16)
    check_model(trained, "here", shape, fingerprint="0" * 16, model="this one")
    with pytest.raises(InputError, match=message):
        check_model(
            trained, "here", replace(shape, **change), fingerprint=fingerprint, model="this one"
        )


def test_weights_are_scored_as_the_file_will_hold_them(tmp_path):
    """PowerInfer's converter rounds any dtype to f16."""
    fc1 = torch.full((4, 8), 1.0001)
    write(tmp_path / "p", {"fc1.weight": fc1, "fc2.weight": torch.ones(16, 4)})
    assert torch.equal(load_predictors(tmp_path / "p").layers[0].fc1_RD, fc1.half())
    write(tmp_path / "p", {"fc1.weight": 1e5 * fc1, "fc2.weight": torch.ones(16, 4)})
    with pytest.raises(InputError, match="beyond 65504"):
        load_predictors(tmp_path / "p")
    write(tmp_path / "p", {"fc1.weight": [1], "fc2.weight": torch.ones(16, 4)})
    with pytest.raises(InputError, match="fc1.weight is a list, expected a dense tensor"):
        load_predictors(tmp_path / "p")


@pytest.fixture
def copy(trained, recipe, tmp_path) -> Path:
    """A copy of a trained folder to damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in recipe.out.glob("*.*"):
        if path.is_file():
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtypes": None}, "its dtypes makes no sense"),
        ({"dtypes": [["f16"], "f16"]}, "its dtypes makes no sense"),
        ({"dtypes": ["f16"]}, "its ranks makes no sense"),
        (
            {"dtypes": ["f16"], "ranks": [32], "calibration": [SCORES]},
            "manifest.json is of 1",
        ),
        ({"dtypes": ["q4_0", "q4_0"]}, "q4_0 cannot hold these values"),
        ({"recipe": None}, "its recipe makes no sense"),
        ({"recipe": {"a": json.loads("[" * 600 + "]" * 600)}}, "its recipe makes no sense"),
        ({"ranks": [1, 1]}, r"are \(32, 64, 200\), but manifest.json says \(1, 64, 200\)"),
        ({"hidden_size": 65}, r"but manifest.json says \(32, 65, 200\)"),
        ({"ranks": [True, 32]}, "its ranks makes no sense"),
        ({"hidden_size": 10**400}, "its hidden_size makes no sense"),
        ({"ffn_matrices": -3}, "its ffn_matrices makes no sense"),
        ({"model": 7}, "its model makes no sense"),
        ({"activation": "gelu"}, "its activation makes no sense"),
        ({"activation_threshold": "x"}, "its activation_threshold makes no sense"),
        ({"activation_threshold": 1e308}, "its activation_threshold makes no sense"),
        ({"activation_threshold": -0.1}, "its activation_threshold makes no sense"),
        ({"calibration": [None, None]}, "its calibration makes no sense"),
        ({"calibration": [{}, {}]}, "its calibration makes no sense"),
        ({"calibration": []}, "its calibration makes no sense"),
        ({"calibration": [SCORES, {**SCORES, "recall": 5}]}, "its calibration makes no sense"),
        ({"calibration": [SCORES, {**SCORES, "recall": True}]}, "its calibration makes no sense"),
        ({"format_version": 99}, "99.*newer"),
        ({"format_version": 2}, "version 2 of an older sparsecast, expected 3; train again"),
        ({"format_version": True}, "format_version is True"),
        ({"unknown": 1}, "unknown 'unknown'"),
    ],
)
def test_an_inconsistent_manifest_is_refused(copy, sealed, change, match):
    """The manifest's own checksum is right."""
    sealed(copy, **change)
    with pytest.raises(InputError, match=match) as error:
        load_predictors(copy)
    assert "\n" not in str(error.value)


def test_an_edited_manifest_is_refused(copy):
    path = copy / "manifest.json"
    value = json.loads(path.read_text())
    value["calibration"][0]["recall"] = 1.0
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"manifest.json: damaged or edited"):
        load_predictors(copy)


def test_a_manifest_without_its_own_checksum_is_refused(copy):
    path = copy / "manifest.json"
    value = json.loads(path.read_text())
    del value["checksums"]["manifest.json"]
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"its checksums makes no sense"):
        load_predictors(copy)


@pytest.mark.parametrize(
    ("text", "match"),
    [("[" * 100_000, "nested too deeply"), ('{"calibration": NaN}', "NaN is no JSON number")],
)
def test_a_manifest_that_is_no_json_is_refused(copy, text, match):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=match):
        load_predictors(copy)


def swapped(folder: Path) -> None:
    first, second = folder / "model_0.pt", folder / "model_1.pt"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def zeroed(folder: Path) -> None:
    value = torch.load(folder / "model_1.pt", weights_only=True)
    torch.save({name: torch.zeros_like(w) for name, w in value.items()}, folder / "model_1.pt")


def threshold(folder: Path) -> None:
    (folder / "config.json").write_text('{"sparse_threshold": 0.5}')


def flipped(folder: Path) -> None:
    path = folder / "model_0.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [swapped, zeroed, threshold, flipped])
def test_files_that_were_not_trained_are_refused(copy, damage, sealed):
    damage(copy)
    with pytest.raises(InputError, match="is not the file that was trained .xxh3_128"):
        load_predictors(copy)
    sealed(copy)
    load_predictors(copy)  # only the checksums were wrong


def test_a_layer_that_the_manifest_does_not_know_is_refused(copy):
    shutil.copy(copy / "model_1.pt", copy / "model_2.pt")
    with pytest.raises(InputError, match="holds predictors for 3 layers, but manifest.json is of"):
        load_predictors(copy)


@pytest.mark.parametrize("name", ["model_1.pt", "config.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "loop", "device"])
def test_pipes_and_folders_are_refused_without_waiting(copy, name, kind):
    path = copy / name
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    told = {"FIFO": "is a FIFO", "folder": "is a folder", "loop": "cannot be read"}
    with pytest.raises(InputError, match=f"{name}: {told.get(kind, 'is a device')}"):
        load_predictors(copy)


def test_a_huge_layer_number_is_a_gap_and_takes_no_memory(tmp_path):
    write(tmp_path, weights())
    write(tmp_path, weights(), "model_99999999999.pt")
    with pytest.raises(InputError, match="model_1.pt is missing"):
        load_predictors(tmp_path)


def test_an_unreadable_folder_is_not_called_empty(as_nobody):
    folder = as_nobody.folder / "p"
    write(folder, weights())
    folder.chmod(0)
    with as_nobody(), pytest.raises(InputError, match="p: may not be read"):
        load_predictors(folder)
    folder.chmod(0o755)


def test_a_manifest_whose_format_cannot_have_these_rows_is_refused(copy, sealed):
    write(copy, {"fc1.weight": torch.ones(16, 64), "fc2.weight": torch.ones(200, 16)})
    sealed(copy, dtypes=["q8_0", "f16"], ranks=[16, 32])
    with pytest.raises(InputError, match=r"in blocks of 32, but fc1 is \(16, 64\)"):
        load_predictors(copy)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda w: w.to_sparse(), "of the layout torch.sparse_coo"),
        (lambda w: w.to_sparse_csr(), "of the layout torch.sparse_csr"),
        (lambda w: w.to("meta"), "without values"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "a tensor of torch.qint8"),
        (lambda w: w.to(torch.complex64), "a tensor of torch.complex64"),
        (lambda w: w.to(torch.float8_e4m3fn), "a tensor of torch.float8_e4m3fn"),
        (lambda w: w.int(), "a tensor of torch.int32"),
        (lambda w: torch.zeros(1).expand(4, 8), "a view that repeats its values"),
        (lambda w: torch.zeros(1).expand(1 << 40, 8), "speaks of 1099511627776 values"),
        (lambda w: torch.nested.nested_tensor([w, w]), "a tensor of the layout|not a readable"),
        (lambda w: "text", "fc1.weight is a str"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_floats_are_refused_in_one_line(tmp_path, make, match):
    value = weights()
    write(tmp_path, {**value, "fc1.weight": make(value["fc1.weight"])})
    with pytest.raises(InputError, match=match) as error:
        load_predictors(tmp_path)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_a_transposed_matrix_is_accepted(tmp_path):
    value = {name: w.half() for name, w in weights().items()}
    write(tmp_path, {name: w.T.contiguous().T for name, w in value.items()})
    loaded = load_predictors(tmp_path).layers[0]
    assert torch.equal(loaded.fc1_RD, value["fc1.weight"])
    assert loaded.fc1_RD.is_contiguous()


def test_a_torchscript_file_is_refused_without_torchs_advice(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model_0.pt")
    with pytest.raises(InputError, match=r"model_0.pt: holds more than tensors") as error:
        load_predictors(tmp_path)
    assert "weights_only" not in str(error.value)
