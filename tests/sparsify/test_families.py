"""Every family from SiLU or GELU to a folder that sparsecast, and with ReLU transformers, reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.recorder import Recorder
from sparsecast.sparsify import run
from sparsecast.sparsify.run import sparsify
from tests.tools.dense_families import KINDS, write_model

TIED = ("qwen2", "gemma2", "opt", "falcon")
SHAPES = ("llama-biased", "qwen3", "granite", "olmo", "gemma", "gemma2", "opt", "falcon")
"""One of each kind of FFN and norm."""
QUICK = ("llama-biased", "gemma2")


def _some_slow(kinds, **marked):
    """The kinds that are not quick are among the slow tests."""
    for kind in kinds:
        marks = () if kind in QUICK else pytest.mark.slow
        yield pytest.param(kind, *marked.values(), marks=marks)


CASES = [*_some_slow(KINDS, tied=False), *_some_slow(TIED, tied=True)]


@pytest.fixture
def source(tmp_path, model_folder):
    def make(kind: str, dtype: str = "float32", **fields):
        return write_model(tmp_path / "source", model_folder, kind, dtype, **fields)

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_a_family_becomes_sparse_and_is_recorded(
    kind, tied, source, options, short_corpus, tmp_path
):
    folder = source(kind, "bfloat16", tie_word_embeddings=tied)
    before = config_of(folder)
    out = sparsify(options(model=str(folder), shift_tolerance=1.0))

    after, threshold = config_of(out), config_of(out)["hidden_act_param"]
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed == {KINDS[kind].act_key, "hidden_act_param"}
    assert after[KINDS[kind].act_key] == "fatrelu"
    with safe_open(out / "model.safetensors", "pt") as file:
        assert any("lm_head" in name for name in file.keys()) != tied  # noqa: SIM118
    store = collect(
        CollectConfig(
            model=str(out), corpus=str(short_corpus), out=tmp_path / "acts", tokens=200, seq_len=32
        )
    )
    assert (store.manifest.activation, store.manifest.activation_threshold) == (
        "fatrelu",
        threshold,
    )


@pytest.mark.parametrize("kind", [*_some_slow(SHAPES)])
def test_with_relu_plain_transformers_computes_the_same(kind, source, options, monkeypatch):
    monkeypatch.setattr(run, "choose_activation", lambda _plan, setup, _trained: (setup.rule, []))
    out = sparsify(options(model=str(source(kind))))
    ours, _ = load_model(str(out), device="cpu")
    for name in ("fatrelu", "drelu"):
        monkeypatch.delitem(ACT2FN, name)  # which sparsecast has taught it

    theirs = AutoModelForCausalLM.from_pretrained(out)

    ids = torch.randint(3, 512, (2, 20))
    zeros = []
    with torch.inference_mode(), Recorder(theirs, lambda _l, _x, x1: zeros.append(x1 == 0)):
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert all(0.2 < layer.double().mean() < 0.8 for layer in zeros)


FOREIGN = {
    "minicpm": (
        "llama",
        {
            "architectures": ["MiniCPMForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 8,
            "rope_scaling": None,
        },
        "granite",
    ),
    "RefinedWebModel": ("falcon", {"architectures": ["RWForCausalLM"]}, "falcon"),
}
"""model_type to the names of its tensors, its own fields, and what it is saved as."""


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_model_that_needs_code_of_its_own_is_saved_as_one_that_does_not(kind, source, options):
    names, fields, saved = FOREIGN[kind]
    folder = source(names, "bfloat16", tie_word_embeddings=True)
    (folder / "config.json").write_text(
        json.dumps(config_of(folder) | {"model_type": kind} | fields)
    )

    out = sparsify(options(model=str(folder), shift_tolerance=1.0))

    config = config_of(out)
    assert (config["model_type"], config["dtype"]) == (saved, "bfloat16")
    assert "auto_map" not in config
    assert type(AutoModelForCausalLM.from_pretrained(out).config).model_type == saved


def test_a_gemma_with_two_fields_for_its_activation_gets_both_right(source, options):
    """As google/gemma-2-2b has them."""
    folder = source("gemma2")
    both = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    (folder / "config.json").write_text(json.dumps(config_of(folder) | both))

    out = sparsify(options(model=str(folder), shift_tolerance=1.0, baselines=True))

    config = config_of(out)
    assert config["hidden_act"] == config["hidden_activation"] == "fatrelu"
    assert "GELU original" in json.loads((out / "sparsify.json").read_text())["held_out"]


def test_a_family_whose_ffn_is_built_otherwise_says_so_before_anything_is_written(
    source, options, tmp_path
):
    folder = source("llama")
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config_of(folder) | config))

    with pytest.raises(InputError, match="'phi3': gate and up are one matrix"):
        sparsify(options(model=str(folder)))

    assert [path.name for path in tmp_path.iterdir()] == ["source"]
