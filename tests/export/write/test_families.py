"""Which families export takes: those that the engine computes, and no other."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import FAMILIES
from sparsecast.export.checks.header import check_header
from sparsecast.export.write.hparams import REASONS, read_hparams

FIELD = {"opt": "activation_function", "falcon": "activation"}
FIELD |= dict.fromkeys(("gemma2", "gemma3_text"), "hidden_activation")
SQUARED = ("arcee", "nemotron", "jais2", "nanochat", "persimmon", "bitnet")
RELU = ("ernie4_5", "olmo", "seed_oss", "smollm3", "gemma", "gemma2", "gemma3_text")
"""Families that the engine cannot run, though some of their models have ReLU."""


def checkpoint(folder, kind: str, act: str) -> Checkpoint:
    """A model's folder of which only the config was written."""
    fields = {"model_type": kind, FIELD.get(kind, "hidden_act"): act, "hidden_size": 64}
    sizes = {"num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 128}
    (folder / "config.json").write_text(json.dumps(fields | sizes))
    return Checkpoint(str(folder))


@pytest.mark.parametrize("kind", [*SQUARED, "llama", "mistral", "opt", "falcon"])
def test_no_squared_relu_is_exported(kind, tmp_path):
    model = checkpoint(tmp_path, kind, "relu2")
    field = FIELD.get(kind, "hidden_act")
    said = f"{field} is 'relu2': ReLU².*works with collect, .* and evaluate, and in sparsify_model"
    with pytest.raises(InputError, match=said):
        read_hparams(model)


@pytest.mark.parametrize("field", ["hidden_act", "activation_function", "activation"])
def test_verify_fails_a_file_beside_a_model_with_squared_relu(field):
    source = SimpleNamespace(
        file=SimpleNamespace(keys={}),
        header=SimpleNamespace(arch="llama"),
        config={"model_type": "llama", field: "relu2"},
    )
    check = check_header(source)
    assert not check.ok
    assert "ReLU², which the engine does not compute" in check.detail


@pytest.mark.parametrize("kind", [*SQUARED, *RELU])
def test_a_family_without_an_entry_is_no_llama(kind, tmp_path):
    model = checkpoint(tmp_path, kind, "relu")
    with pytest.raises(InputError, match=f"'{kind}', but the engine computes only .*llama, mistra"):
        read_hparams(model)


def test_nor_is_one_that_is_new(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "stablelm", FAMILIES["llama"])
    with pytest.raises(InputError, match="'stablelm', but the engine computes only"):
        read_hparams(checkpoint(tmp_path, "stablelm", "relu"))


DENSE = {kind for kind, family in FAMILIES.items() if family.experts is None}


@pytest.mark.parametrize("kind", sorted(DENSE - {*SQUARED, *RELU, *REASONS}))
def test_the_others_are_read_as_far_as_their_weights(kind, tmp_path):
    with pytest.raises(InputError, match=r"no model\.safetensors|wide, expected more than 1000"):
        read_hparams(checkpoint(tmp_path, kind, "relu"))
