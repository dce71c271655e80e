"""Activations and the family table: exact semantics, and errors that say what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Olmo2Config, Phi3Config
from transformers.activations import ACT2FN

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import FATReLU
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.01, 0.03, 0.0741, 1 / 3])
def test_fatrelu_keeps_the_threshold_itself_as_rounded_to_the_dtype(dtype, threshold):
    edge = torch.tensor(threshold, dtype=dtype)
    below = torch.nextafter(edge.float(), torch.tensor(-1.0)) if dtype == torch.float32 else None
    x = torch.stack([edge, -edge, torch.zeros((), dtype=dtype), edge * 2])

    out = FATReLU(threshold)(x)

    assert out.tolist() == [edge.item(), 0.0, 0.0, (edge * 2).item()]
    assert out.dtype == dtype
    if below is not None:
        assert FATReLU(threshold)(below).item() == 0.0


def test_what_transformers_builds_from_a_name_alone_refuses_to_run():
    for name, lack in {"fatrelu": "no threshold", "drelu": "no ReLU behind up"}.items():
        with pytest.raises(RuntimeError, match=f"{lack}.*sparsecast.integrations.transformers"):
            ACT2FN[name](torch.ones(3))


def test_load_model_reads_the_threshold(model_folder):
    model, _ = load_model(str(model_folder), device="cpu")
    assert [layer.mlp.act_fn.threshold for layer in model.model.layers] == [0.2] * 3
    model, _ = load_model(str(model_folder), device="cpu", activation_threshold=0.5)
    assert model.model.layers[0].mlp.act_fn.threshold == 0.5


@pytest.mark.parametrize("param", [None, "x", -0.1, True])
def test_a_lost_or_broken_threshold_is_refused(param):
    config = LlamaConfig(hidden_act="fatrelu", hidden_act_param=param)
    with pytest.raises(InputError, match="--activation-threshold"):
        activation_rule(config, "m")


def test_silu_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"'silu'.*no exact zeros.*sparsecast sparsify"):
        activation_rule(LlamaConfig(hidden_act="silu"), "m")


def test_an_unknown_family_names_the_table():
    with pytest.raises(
        InputError, match=r"model_type is 'gpt2'.*llama.*sparsecast.core.models.famil"
    ):
        family_of(GPT2Config(), "m")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Phi3Config(), r"'phi3': gate and up are one matrix \(gate_up_proj\), .* its own; use"),
        (Olmo2Config(), "'olmo2': its FFN norm is behind the FFN"),
    ],
    ids=["phi3", "olmo2"],
)
def test_a_family_that_no_row_would_fit_says_why(config, why):
    with pytest.raises(InputError, match=why):
        family_of(config, "m")


def edited(model_folder, tmp_path, **changes):
    shutil.copytree(model_folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(tmp_path / "m")


def test_not_a_causal_lm(model_folder, tmp_path):
    source = edited(model_folder, tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(InputError, match="expected a causal language model"):
        load_model(source)


def test_no_such_model(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_damaged_weights_are_named(model_folder, tmp_path):
    source = edited(model_folder, tmp_path)
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors.*not a readable weights file"):
        load_model(source)


def test_no_tokenizer(model_folder, tmp_path):
    source = edited(model_folder, tmp_path)
    for path in (tmp_path / "m").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="no tokenizer files, expected tokenizer.json"):
        load_model(source)
