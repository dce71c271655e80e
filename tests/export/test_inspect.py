"""What `sparsecast inspect` shows of predictors, bundles and files, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from sparsecast.cli.main import main
from sparsecast.collect.inspect import InspectConfig
from sparsecast.core.errors import InputError
from sparsecast.export.bundle import bundle_file
from sparsecast.export.config import ExportConfig
from sparsecast.export.inspect import inspect
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.predictors.checkpoint import load_predictors


@pytest.fixture(scope="module")
def with_split(tmp_path_factory, model_folder, predictors, acts) -> Path:
    """A bundle with a split of whole layers; not to be written to."""
    out = tmp_path_factory.mktemp("split") / "b"
    cfg = ExportConfig(
        model=str(model_folder),
        predictors=predictors,
        out=out,
        activations=acts.folder,
        vram_budget=1.0,
    )
    return export(cfg).parent


@pytest.fixture
def shown(tmp_path, capsys):
    """Inspect a path: its values as written to a file, and the words on the screen."""

    def run(path: Path) -> tuple[dict, str]:
        capsys.readouterr()
        result = inspect(InspectConfig(path=path, json=tmp_path / "i.json"))
        values = json.loads((tmp_path / "i.json").read_text())
        assert result.ok
        assert values == result.values
        return values, " ".join(capsys.readouterr().err.split())

    return run


def test_predictors_are_shown_layer_by_layer(shown, quantized):
    folder = quantized / "predictor"
    values, text = shown(folder)

    layers = load_predictors(folder).layers
    assert [row["dtype"] for row in values["layers"]] == ["f16", "q8_0", "q4_0"]
    assert [row["rank"] for row in values["layers"]] == [16, 32, 32]
    assert [row["bytes"] for row in values["layers"]] == [layer.nbytes for layer in layers]
    assert {row["recall"] for row in values["layers"]} == {0.5}
    assert values["bytes"] == sum(layer.nbytes for layer in layers)
    files = sum(path.stat().st_size for path in folder.glob("*.pt"))
    stored, here = (f"{count / 2**20:.2f} MiB" for count in (values["bytes"], files))
    assert f"size {stored} in PowerInfer's file ({here} as model_<i>.pt)" in text
    assert "│ 2 │ 32 │ q4_0 │ 24,192 │ 0.5000 │ 0.5000 │" in text
    assert "residual-before-ffn-norm" in text


def test_predictors_without_a_manifest_have_no_scores(shown, predictors, tmp_path):
    folder = Path(shutil.copytree(predictors, tmp_path / "anyones"))
    (folder / "manifest.json").unlink()

    values, text = shown(folder)

    assert values["model"] is None
    assert {row["predicted_sparsity"] for row in values["layers"]} == {None}
    assert "│ 1 │ 16 │ f16 │ 43,008 │ │ │" in text


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "high", 7, None])
def test_scores_that_are_none_are_refused(score, predictors, sealed, tmp_path):
    folder = Path(shutil.copytree(predictors, tmp_path / "edited"))
    scores = [{"recall": score, "predicted_sparsity": 0.5}] * 3
    with pytest.raises(InputError, match=r"NaN|Infinity|calibration makes no sense"):
        inspect(InspectConfig(path=sealed(folder, calibration=scores)))


def test_a_model_file_is_shown_without_its_long_arrays(shown, bundle_folder):
    path = bundle_file(bundle_folder)
    values, text = shown(path)

    file = GGUFFile(path)
    assert values["kind"] == "model"
    assert values["keys"]["tokenizer.ggml.tokens"] == {"length": 512}
    assert values["keys"]["llama.feed_forward_length"] == 1280
    assert values["keys"].keys() == file.keys.keys()
    assert len(values["tensors"]) == len(file.entries)
    tensor = {"name": "blk.0.fc2.weight", "shape": [1280, 16], "type": "f16", "bytes": 40_960}
    assert tensor in values["tensors"]
    assert "512 values" in text
    assert "│ blk.0.fc2.weight │ 1280 x 16 │ f16 │ 40,960 │" in text


def test_a_split_is_shown_by_layer(shown, with_split):
    path = next(with_split.glob("*.gpuidx"))
    values, text = shown(path)

    row = {"layer": 2, "neurons": 1280, "width": 1280, "bytes": 1280 * (3 * 64 * 2 + 4)}
    assert values["kind"] == "gpu split"
    assert values["layers"][2] == row
    assert sum(r["bytes"] for r in values["layers"]) == values["keys"]["split.vram_capacity"]
    assert "3,840 neurons on the GPU" in text
    assert "│ 2 │ 1,280 │ 1,280 │ 496,640 │" in text


def test_a_split_away_from_its_model_is_shown_without_bytes(shown, with_split, tmp_path):
    path = Path(shutil.copy(next(with_split.glob("*.gpuidx")), tmp_path))
    values, text = shown(path)

    assert [row["bytes"] for row in values["layers"]] == [None] * 3
    assert "│ 2 │ 1,280 │ 1,280 │ ? │" in text


def test_a_bundle_is_shown_with_all_it_has(shown, with_split):
    values, text = shown(with_split)

    names = {file["name"] for file in values["files"]}
    assert {"README.md", "predictor/model_2.pt", "activation/activation_0.pt"} <= names
    assert {file["bytes"] for file in values["files"] if file["name"] == "README.md"} == {
        (with_split / "README.md").stat().st_size
    }
    assert values["model"]["kind"] == "model"
    assert values["gpu_split"]["layers"][0]["neurons"] == 1280
    assert values["predictors"]["layers"][0]["rank"] == 16
    for word in ("blk.2.attn_q.weight", "neurons on the GPU", "predicted sparsity", "model_0.pt"):
        assert word in text


def test_a_bundle_without_a_split_has_none(shown, bundle_folder):
    values, text = shown(bundle_folder)

    assert values["gpu_split"] is None
    assert "neurons on the GPU" not in text


def test_activations_are_shown_as_ever(shown, acts):
    values, text = shown(acts.folder)

    assert values["tokens"]["train"] == 5_400
    assert "every shard is as it was written" in text


def test_a_name_cannot_play_with_the_terminal(shown, tmp_path):
    """Neither by control characters nor by rich's markup, and not by a number that JSON has not."""
    name, value = b"\x1b[2J[red]", b"[/nope]\x07"
    path = tmp_path / "x.gguf"
    keys = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, len(value)) + value
    keys += struct.pack("<Q3sIf", 3, b"nan", 6, float("nan"))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + keys + bytes(64))

    values, text = shown(path)

    assert r"\x1b[2J[red]" in text
    assert r"[/nope]\x07" in text
    assert "\x1b[2J" not in text
    assert values["keys"]["nan"] is None


def truncated(folder: Path) -> Path:
    path = bundle_file(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def truncated_in_its_bundle(folder: Path) -> Path:
    truncated(folder)
    return folder


def foreign(folder: Path) -> Path:
    return folder / "README.md"


def other_magic(folder: Path) -> Path:
    return folder / "predictor" / "model_0.pt"


def damaged_predictor(folder: Path) -> Path:
    (folder / "predictor" / "model_1.pt").write_bytes(b"junk")
    return folder / "predictor"


def lost_predictor(folder: Path) -> Path:
    (folder / "predictor" / "model_1.pt").unlink()
    return folder


def two_models(folder: Path) -> Path:
    shutil.copy(bundle_file(folder), folder / "two.powerinfer.gguf")
    return folder


def empty_file(folder: Path) -> Path:
    (folder / "x.gguf").touch()
    return folder / "x.gguf"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (truncated, "output.weight ends|truncated"),
        (truncated_in_its_bundle, "truncated"),
        (foreign, "README.md: begins with"),
        (other_magic, "model_0.pt: begins with b'PK"),
        (damaged_predictor, "model_1.pt: is not the file that was trained"),
        (lost_predictor, "model_1.pt is missing"),
        (two_models, "holds 2 files"),
        (empty_file, "x.gguf: is empty"),
        (
            lambda folder: folder / "activation",
            "activation: holds nothing that sparsecast writes; expected",
        ),
        (lambda folder: folder / "nowhere", "nowhere: no such file, expected"),
    ],
)
def test_a_bad_path_gets_one_line_and_exit_code_2(make, reason, bundle, capsys):
    path = make(bundle)

    with pytest.raises(SystemExit) as exit_info:
        main(["inspect", str(path)])

    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.count("\n") == 1
    assert any(part in error for part in reason.split("|")), error


def test_a_result_that_cannot_be_written_is_refused_first(bundle_folder, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["inspect", str(bundle_folder), "--json", str(bundle_folder)])

    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("sparsecast: --json: ")
    assert error.count("\n") == 1


def test_a_type_that_is_not_decoded_is_shown(shown, tmp_path):
    """What PowerInfer's quantize makes: k-quants and q5_0."""
    name = b"blk.0.ffn_up.weight"
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 256, 2, 14, 0)
    path = tmp_path / "x.gguf"
    head = b"PWRI" + struct.pack("<IQQ", 3, 1, 0) + tensor
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(2 * 210))

    values, _ = shown(path)

    assert values["tensors"] == [
        {"name": name.decode(), "shape": [2, 256], "type": "q6_K", "bytes": 420}
    ]


def test_a_long_list_is_cut_on_the_screen(shown, tmp_path):
    """Not in the JSON."""
    n = 3000
    names = [b"blk.%d.x" % i for i in range(n)]
    head = b"GGUF" + struct.pack("<IQQ", 3, n, 0)
    for i, name in enumerate(names):
        head += struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 8, 0, i * 32)
    path = tmp_path / "x.gguf"
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(32 * n))

    values, text = shown(path)

    assert len(values["tensors"]) == n
    assert "blk.999.x" in text
    assert "blk.1000.x" not in text
    assert "and 2,000 more tensors" in text


@pytest.mark.parametrize("where", ["predictor", "predictor/model_1.pt", "split", "model"])
@pytest.mark.parametrize("kind", ["FIFO", "loop"])
def test_what_is_no_file_is_refused_and_never_waited_for(where, kind, with_split, tmp_path):
    folder = Path(shutil.copytree(with_split, tmp_path / "b"))
    model = bundle_file(folder)
    path = {"split": next(folder.glob("*.gpuidx")), "model": model}.get(where, folder / where)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with pytest.raises(InputError, match=rf"{path.name}: (is a FIFO|is no folder|cannot be read)"):
        inspect(InspectConfig(path=folder))


def test_links_that_loop_are_not_followed(shown, bundle_folder, tmp_path):
    folder = Path(shutil.copytree(bundle_folder, tmp_path / "b"))
    (folder / "predictor" / "again").symlink_to(folder, target_is_directory=True)

    values, _ = shown(folder)

    assert sum(file["name"].endswith("model_0.pt") for file in values["files"]) == 1
