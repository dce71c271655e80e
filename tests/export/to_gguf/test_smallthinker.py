"""A GGUF for llama.cpp gives transformers' logits, computed by llama.cpp's graph in numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from smallthinker_numpy import SmallThinker
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.models.loading import load_model
from sparsecast.export.config import ExportConfig
from sparsecast.export.run import export

IDS = [1, *range(40, 88, 3), 7, 7, 300, 5]
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu",
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e4},
}
"""Heads whose sizes do not add up to the hidden size, a narrow FFN, and positions divided by 4."""


@pytest.fixture
def wide(model_folder, tmp_path) -> Path:
    folder = tmp_path / "wide"
    LlamaForCausalLM(LlamaConfig(**WIDE)).half().save_pretrained(folder)
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def written(model: Path, out: Path, **options: object) -> Path:
    return export(ExportConfig(model=str(model), format="gguf", out=out, **options))


def change_config(model: Path, **new: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


def logits_of(model: Path) -> np.ndarray:
    """transformers' logits in float64, but for its norms and rotations, which are float32."""
    net = load_model(str(model), device="cpu", dtype="float32")[0].double()
    with torch.no_grad():
        return net(input_ids=torch.tensor([IDS])).logits[0].numpy()


def check(model: Path, file: Path, tolerance: float = 2e-5) -> None:
    want, got = logits_of(model), SmallThinker(file).logits(IDS)
    assert np.abs(want).max() > 1
    assert np.abs(got - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("name", ["llama", "llama-grouped", "llama-tied", "granite"])
def test_the_file_computes_the_models_logits(zoo, tmp_path, name):
    file = written(zoo(name), tmp_path / "g", dtype="f32")
    check(zoo(name), file)


def test_any_head_size_a_narrow_ffn_and_linear_rope(wide, tmp_path):
    file = written(wide, tmp_path / "g", dtype="f32")
    check(wide, file)
    keys = SmallThinker(file).keys
    assert keys["smallthinker.rope.scaling.type"] == "linear"
    assert keys["smallthinker.rope.scaling.factor"] == 4
    assert keys["smallthinker.rope.freq_base"] == 3e4
    # The oracle tells the difference: it is no llama without any of these.
    broken = SmallThinker(file)
    broken.keys["smallthinker.rope.scaling.factor"] = 1.0
    assert np.abs(broken.logits(IDS) - logits_of(wide)).max() > 0.01


def test_the_oracle_sees_what_would_be_another_model(zoo, tmp_path):
    model = zoo("llama-grouped")
    file, want = written(model, tmp_path / "g", dtype="f32"), logits_of(model)
    for name in ("attn_q", "attn_k", "ffn_gate_exps", "ffn_up_exps", "attn_norm", "ffn_norm"):
        broken = SmallThinker(file)
        tensor = broken.tensors[f"blk.1.{name}.weight"]
        rows = np.roll(np.arange(tensor.shape[-2 if tensor.ndim > 1 else -1]), 1)
        moved = tensor[..., rows, :] if tensor.ndim > 1 else tensor[rows]
        broken.tensors[f"blk.1.{name}.weight"] = moved
        assert np.abs(broken.logits(IDS) - want).max() > 0.01, name


def test_minicpms_scales_and_a_fatrelu_taken_as_relu(zoo, tmp_path, capsys):
    file = written(zoo("minicpm"), tmp_path / "g", dtype="f32", activation_threshold=0.0)
    assert "says fatrelu(0.05); --activation-threshold 0" in capsys.readouterr().err
    relu = Path(shutil.copytree(zoo("minicpm"), tmp_path / "relu"))
    change_config(relu, hidden_act="relu")
    check(relu, file)
    assert "output.weight" in SmallThinker(file).tensors  # tied, with another scale


def test_a_window_shortens_the_context(zoo, tmp_path, capsys):
    model = Path(shutil.copytree(zoo("llama-grouped"), tmp_path / "model"))
    change_config(model, model_type="mistral", architectures=["MistralForCausalLM"])
    change_config(model, sliding_window=128)
    file = written(model, tmp_path / "g", dtype="f32")
    assert "attends to the last 128 tokens" in capsys.readouterr().err
    assert "attends to the last 128 tokens" in (tmp_path / "g" / "README.md").read_text()
    assert SmallThinker(file).keys["smallthinker.context_length"] == 128
    check(model, file)


@pytest.mark.parametrize(
    ("dtype", "label", "tolerance"), [("f16", 1, 2e-5), ("q8_0", 7, 0.03), ("q4_0", 2, 0.4)]
)
@pytest.mark.parametrize("name", ["llama-grouped", "llama-tied"])
def test_types_of_the_file(zoo, tmp_path, name, dtype, label, tolerance):
    file = written(zoo(name), tmp_path / "g", dtype=dtype)
    check(zoo(name), file, tolerance)  # f16 holds the checkpoint's weights as they are
    kinds = {t.name: t.tensor_type for t in GGUFReader(file).tensors}
    assert SmallThinker(file).keys["general.file_type"] == label
    whole = GGMLQuantizationType[dtype.upper()]
    head = "output.weight" if name == "llama-grouped" else "token_embd.weight"
    for tensor, kind in kinds.items():
        if "norm" in tensor or "ffn_gate_inp" in tensor:
            assert kind == GGMLQuantizationType.F32
        elif dtype == "q4_0" and tensor == head:
            assert kind == GGMLQuantizationType.Q8_0
        else:
            assert kind == whole
    assert ("output.weight" in kinds) == (name == "llama-grouped")


def test_experts_weigh_exactly_one(zoo, tmp_path):
    found = SmallThinker(written(zoo("llama"), tmp_path / "g", dtype="f32"))
    assert found.key("expert_count") == found.key("expert_used_count") == 1
    for i in range(3):
        assert not found.tensor(f"blk.{i}.ffn_gate_inp").any()
        assert found.tensor(f"blk.{i}.ffn_gate_inp").shape == (1, 64)
        assert found.tensor(f"blk.{i}.ffn_down_exps").shape == (1, 64, 1280)
