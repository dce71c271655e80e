"""Models of a few hundred weights, and options that train them in a second."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sparsecast.sparsify import config, run
from sparsecast.sparsify.config import Preset, SparsifyConfig
from tests.tools import dense_families

GATED, OPT, FALCON = (
    fields | {"num_hidden_layers": 1}
    for fields in (dense_families.GATED, dense_families.OPT, dense_families.FALCON)
)
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED, "hidden_act"),
    "mistral": (MistralForCausalLM, MistralConfig, GATED, "hidden_act"),
    "opt": (OPTForCausalLM, OPTConfig, OPT, "activation_function"),
    "falcon": (FalconForCausalLM, FalconConfig, FALCON, "activation"),
}


MICRO = Preset(
    hidden_size=32,
    ffn_width=96,
    layers=2,
    heads=2,
    kv_heads=1,
    vocab_size=400,
    tokens=40_960,
    lr=5e-3,
    l1=5.0,
)


@pytest.fixture(autouse=True)
def _micro(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "micro", MICRO)


@pytest.fixture(autouse=True)
def _quick_figure(request, monkeypatch):
    """Draw nothing but in the tests of curves: the page takes longer than training these models."""
    if request.path.stem != "test_curves":
        monkeypatch.setattr(run, "write_figure", lambda path, *_: path.touch())


@pytest.fixture(scope="session")
def short_corpus(tmp_path_factory, corpus) -> Path:
    """The first 3,000 characters of 6 files."""
    folder = tmp_path_factory.mktemp("short")
    for path in sorted(corpus.iterdir())[:6]:
        (folder / path.name).write_text(path.read_text()[:3_000])
    return folder


@pytest.fixture
def dense(tmp_path, model_folder):
    """(family, activation, **fields) to a folder of random weights, with 512 pieces."""

    def make(family: str = "llama", act: str = "silu", **fields) -> Path:
        model_of, config_of, sizes, key = KINDS[family]
        torch.manual_seed(3)
        described = config_of(**copy.deepcopy(sizes) | {"vocab_size": 512, key: act} | fields)
        folder = tmp_path / f"{family}-{act}"
        model_of(described).save_pretrained(folder)
        for path in model_folder.glob("tokenizer*"):
            shutil.copy(path, folder)
        return folder

    return make


@pytest.fixture
def options(tmp_path, short_corpus):
    """Four steps of two sequences of 32 tokens, of ProSparse's recipe unless a target is given."""

    def make(**changes) -> SparsifyConfig:
        if not {"target_sparsity", "max_perplexity_increase"} & set(changes):
            changes = {"l1": 5.0 if changes.get("preset") == "micro" else 0.1} | changes
        base = {"corpus": str(short_corpus), "out": tmp_path / "out", "device": "cpu"}
        base |= {"tokens": 256, "batch_tokens": 64, "seq_len": 32, "eval_tokens": 200, "lr": 1e-2}
        return SparsifyConfig(**base | changes)

    return make
