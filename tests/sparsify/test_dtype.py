"""A model is saved in the dtype that it came in, and scored as it is saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsecast.core.models.loading import load_model
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.predictor import Predictor
from sparsecast.sparsify.measure import score
from sparsecast.sparsify.run import sparsify
from tests.tools.dense_families import write_model
from tests.tools.measured_text import held_out_batches

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def source(tmp_path, model_folder):
    """The same values, which every dtype can hold, stored in one of them."""

    def make(stored: str, **fields):
        folder = write_model(tmp_path / stored, model_folder, "llama", "bfloat16")
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.to(DTYPES[stored]).save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
        return folder

    return make


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_weights_are_those_of_training_rounded_once(source, options, tmp_path, dtype):
    whole = sparsify(options(model=str(source("float32")), out=tmp_path / "whole"))
    out = sparsify(options(model=str(source(dtype)), out=tmp_path / "half"))

    assert json.loads((whole / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    got = weights(out)
    for name, weight in weights(whole).items():
        assert weight.dtype == torch.float32
        assert got[name].dtype == DTYPES[dtype]
        assert torch.equal(got[name], weight.to(DTYPES[dtype])), name
    assert any((weights(whole)[name] != weight.float()).any() for name, weight in got.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scores_are_those_of_the_saved_weights(source, options, dtype):
    cfg = options(model=str(source(dtype)), shift_tolerance=1.0)
    told = list(json.loads((sparsify(cfg) / "sparsify.json").read_text())["held_out"].values())[-1]

    model, tokenizer = load_model(str(cfg.out), device="cpu")
    again = score(model, held_out_batches(cfg, tokenizer))

    assert again.perplexity == pytest.approx(told["perplexity"], rel=1e-6)
    assert again.sparsity == pytest.approx(told["sparsity"], abs=1e-6)


@pytest.mark.parametrize(
    ("stored", "said", "saved"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_the_dtype_is_the_one_that_transformers_loads(source, options, stored, said, saved):
    folder = source(stored, dtype=said)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == DTYPES[saved]

    out = sparsify(options(model=str(folder)))

    assert {weight.dtype for weight in weights(out).values()} == {DTYPES[saved]}


def test_export_writes_a_model_in_bfloat16_as_float16(options, tmp_path, model_folder):
    folder = write_model(tmp_path / "m", model_folder, "llama", "bfloat16", intermediate_size=1024)
    out = sparsify(options(model=str(folder)))
    one = Predictor(torch.randn(8, 16), torch.randn(1024, 8), "f16")
    PredictorSet([one] * 2, 0.0, None).save(tmp_path / "p")

    bundle = export(ExportConfig(model=str(out), predictors=tmp_path / "p", out=tmp_path / "b"))

    up = weights(out)["model.layers.1.mlp.up_proj.weight"]
    assert up.dtype == torch.bfloat16
    assert torch.equal(GGUFFile(bundle).tensor("blk.1.ffn_up.weight"), up.half())


def test_a_preset_is_saved_in_float16(options, short_corpus):
    out = sparsify(options(preset="micro", tokens=256))

    assert {weight.dtype for weight in weights(out).values()} == {torch.float16}
