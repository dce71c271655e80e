"""What a conversion refuses, in one line that says what to do; nothing is left behind."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from native_minicpm import save_minicpm
from safetensors.torch import load_file, save_file

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError
from sparsecast.core.lock import lock_folder
from sparsecast.export.to_llama import run, weights
from sparsecast.export.to_llama.config import ConvertConfig
from sparsecast.export.to_llama.run import convert


@pytest.fixture
def model(once, model_folder, tmp_path) -> Path:
    """A copy that a test may change."""
    source = once("native-minicpm", lambda folder: save_minicpm(folder, model_folder))
    return Path(shutil.copytree(source, tmp_path / "m"))


def run_on(model: Path, out: Path | None = None) -> Path:
    cfg = ConvertConfig(model=str(model), to="llama", out=out or model.parent / "llama")
    return convert(cfg)


def left(model: Path) -> list[str]:
    return [path.name for path in model.parent.iterdir() if path != model]


def edit_weights(model: Path, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"scale_depth": 0}, "scale_depth is 0, expected a number above 0"),
        ({"scale_emb": "12"}, "scale_emb is '12', expected a number"),
        ({"dim_model_base": ...}, "needs numbers under scale_emb, scale_depth"),
        ({"scale_depth": None}, "needs numbers under scale_emb, scale_depth"),
        ({"hidden_act_param": ...}, "hidden_act is 'fatrelu' but hidden_act_param is 'None'"),
        ({"num_hidden_layers": 4}, "describes 4 layers, but the weights hold 3"),
        ({"model_type": "llama", "hidden_act": "relu"}, "'llama', expected a MiniCPM or a Granite"),
        ({"model_type": "mistral", "hidden_act": "relu"}, "there is nothing to fold"),
    ],
)
def test_configs(model, fields, match):
    config = json.loads((model / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not ...}
    (model / "config.json").write_text(json.dumps(config))

    with pytest.raises(InputError, match=match):
        run_on(model)
    assert left(model) == []


def nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = torch.nan


def infinite(tensors):
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = -torch.inf


def too_large(tensors):
    for name, weight in tensors.items():
        tensors[name] = weight.half()
    tensors["model.embed_tokens.weight"][9, 9] = 6000.0


def another_head(tensors):
    tensors["lm_head.weight"] = torch.randn(512, 64)


def silent(tensors):
    tensors["model.norm.weight"].zero_()


def lost(tensors):
    del tensors["model.layers.1.self_attn.o_proj.weight"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (nan, r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
        (infinite, r"layers\.2\.mlp\.down_proj\.weight holds NaN or infinity"),
        (too_large, "embed_tokens.weight holds 6000, which times 12 is beyond float16"),
        (another_head, "lm_head.weight is not model.embed_tokens.weight, but config.json ties"),
        (silent, "all logits are 0, so nothing can be proved"),
        (lost, r"layers\.1\.self_attn\.o_proj\.weight is missing"),
    ],
)
def test_weights(model, change, match):
    edit_weights(model, change)

    with pytest.raises(InputError, match=match):
        run_on(model)
    assert left(model) == []


def test_what_a_llama_has_no_place_for_is_named(model, capfd):
    def add(tensors):
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2, 2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    edit_weights(model, add)
    run_on(model)

    told = " ".join(capfd.readouterr().err.split())
    assert "1 tensors have no place in a llama and are left out, model.layers.0.mlp.extra" in told


def test_folders(model, tmp_path):
    with pytest.raises(InputError, match="is the model's own folder"):
        run_on(model, model)
    linked = tmp_path / "link"
    linked.symlink_to(model)
    with pytest.raises(InputError, match="is the model's own folder"):
        run_on(model, linked)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and holds other files"):
        run_on(model, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    out = tmp_path / "o"
    with lock_folder(out, "conversion"), pytest.raises(InputError, match="is writing it"):
        run_on(model, out)


def test_a_full_disk(model, monkeypatch):
    monkeypatch.setattr("sparsecast.core.disk.free_bytes", lambda path: 10**6)
    with pytest.raises(InputError, match="the model needs 67.4 MB, but only 1 MB are free"):
        run_on(model)
    monkeypatch.undo()

    def fail(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device.*nothing is left behind: make room"):
        run_on(model)
    assert left(model) == []


def test_ctrl_c_leaves_nothing(model, monkeypatch, capfd):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prove", stop)
    out = model.parent / "llama"
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--model", str(model), "--to", "llama", "--out", str(out)])
    assert ended.value.code == 130
    assert "nothing half-written is left behind" in " ".join(capfd.readouterr().err.split())
    assert left(model) == []


def test_a_failed_proof_is_exit_1(model, monkeypatch, capfd):
    monkeypatch.setattr("sparsecast.export.to_llama.proof.BOUND", -1.0)
    args = ["convert", "--model", str(model), "--to", "llama", "--out", str(model.parent / "o")]
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 1
    assert "does not compute what the model does" in " ".join(capfd.readouterr().err.split())
    assert left(model) == []


def test_another_format_and_no_bos(model, tmp_path):
    with pytest.raises(InputError, match="--to: got 'gguf', expected llama"):
        ConvertConfig(model=str(model), to="gguf", out=tmp_path / "o")
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "bos_token": None}))
    with pytest.raises(InputError, match="its tokenizer has no bos_token, but a MiniCPM must"):
        run_on(model)
    assert left(model) == []
