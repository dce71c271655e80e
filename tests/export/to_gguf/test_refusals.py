"""What `--format gguf` refuses, in one line, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from sparsecast.cli.main import main
from sparsecast.collect.inspect import InspectConfig
from sparsecast.core.errors import InputError
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.inspect import inspect
from sparsecast.export.run import export
from sparsecast.export.verify import verify


@pytest.fixture
def model(zoo, tmp_path) -> Path:
    """A copy of a ReLU llama that a test may change."""
    return Path(shutil.copytree(zoo("llama-grouped"), tmp_path / "model"))


def change_config(model: Path, **new: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


def change_weights(model: Path, change) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def refused(model: Path | str, **options: object) -> str:
    out = Path(str(model) + "-out")
    with pytest.raises(InputError) as caught:
        export(ExportConfig(model=str(model), format="gguf", out=out, **options))
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*part*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_activation_but_relu(model, tmp_path):
    change_config(model, hidden_act="fatrelu", hidden_act_param=0.01)
    assert "the activation is fatrelu(0.01), but llama.cpp computes plain ReLU" in refused(model)
    assert "what lies between 0 and 0.01 would count too; sparsify it with" in refused(model)
    change_config(model, hidden_act="drelu")
    assert "the activation is dReLU" in refused(model)
    assert "export a bundle for PowerInfer" in refused(model)
    change_config(model, hidden_act="relu2")
    assert "the activation is ReLU²" in refused(model)
    change_config(model, hidden_act="silu")
    assert "which leaves no exact zeros" in refused(model)
    change_config(model, hidden_act="relu")
    assert "the activation is fatrelu(0.3)" in refused(model, activation_threshold=0.3)
    change_config(model, hidden_act="fatrelu", hidden_act_param=0.0)
    file = export(ExportConfig(model=str(model), format="gguf", out=tmp_path / "zero"))
    assert "What differs" not in file.with_name("README.md").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_bias": True}, "attention_bias is true, but llama.cpp's smallthinker has no"),
        ({"mlp_bias": True}, "mlp_bias is true, but llama.cpp's smallthinker has no biases"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope type is 'dynamic', but llama.cpp's smallthinker supports only",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope rotates 0.5 of each head, but llama.cpp's smallthinker rotates whole heads",
        ),
        ({"head_dim": 32}, "q_proj.weight is [64, 64], but config.json describes [128, 64]"),
    ],
)
def test_what_smallthinker_cannot_express(model, change, reason):
    change_config(model, **change)
    assert reason in refused(model)


def bias(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.float16)


def without_a_norm(weights):
    del weights["model.layers.1.input_layernorm.weight"]


def infinite(weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.full((1280, 64), 7e4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (bias, "holds model.layers.0.self_attn.q_proj.bias, but llama.cpp's smallthinker has no"),
        (without_a_norm, "tensor model.layers.1.input_layernorm.weight is missing"),
        (infinite, "blk.1.ffn_up_exps.weight: holds 70000, which f16 cannot store"),
    ],
)
def test_tensors_that_do_not_fit(model, change, reason):
    change_weights(model, change)
    assert reason in refused(model)


def test_other_families_and_mixtures(zoo):
    for name in ("falcon-7b", "opt"):
        assert "but --format gguf writes only models of type llama" in refused(zoo(name))


def test_rows_that_do_not_fill_blocks(model):
    change_config(model, intermediate_size=1270)

    def narrower(weights):
        for name in list(weights):
            if "gate_proj" in name or "up_proj" in name:
                weights[name] = weights[name][:1270].contiguous()
            if "down_proj" in name:
                weights[name] = weights[name][:, :1270].contiguous()

    change_weights(model, narrower)
    assert "--dtype q8_0: weights are stored in blocks of 32" in refused(model, dtype="q8_0")
    assert "the FFN width is 1270, not a multiple" in refused(model, dtype="q4_0")


def test_options_of_the_other_format(tmp_path, capsys):
    common = ["export", "--model", "m", "--out", str(tmp_path / "out")]
    for extra, found in (
        (["--format", "gguf", "--predictors", "p"], "leave out --predictors, or"),
        (["--format", "gguf", "--activations", "a"], "leave out --activations, or"),
        (["--format", "gguf", "--force"], "leave out --force, or"),
        ([], "export needs --predictors, a folder"),
        (["--predictors", "p", "--dtype", "q8_0"], "--dtype q8_0: only with --format gguf"),
        (["--format", "ggml"], "--format: got 'ggml', expected powerinfer, gguf"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*common, *extra])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert found in err
        assert err.count("\n") == 1


def test_a_finished_file_is_kept_and_another_refused(model, capsys):
    out = model.parent / "out"
    cfg = {"model": str(model), "format": "gguf", "out": out}
    file = export(ExportConfig(**cfg))
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.gguf", "run.json"]
    assert GGUFReader(file).get_field("general.architecture").contents() == "smallthinker"
    with pytest.raises(InputError, match="export --format gguf`, which llama.cpp runs; expected a"):
        verify(VerifyConfig(bundle=out))
    for path in (out, file):
        values = inspect(InspectConfig(path=path)).values
        assert values["path"] == str(file)
        assert values["what"].startswith("a llama with ReLU as a SmallThinker with one expert")
        assert values["what"] in capsys.readouterr().err
    before = file.stat()
    assert export(ExportConfig(**cfg)) == file
    assert "already exported" in capsys.readouterr().err
    assert file.stat() == before
    with pytest.raises(InputError, match=r"a finished file made differently.*dtype"):
        export(ExportConfig(**cfg, dtype="f32"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="holds a damaged file"):
        export(ExportConfig(**cfg))
