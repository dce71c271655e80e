"""Predictors in q8_0 and q4_0: bytes, values, decisions, and damage that verify sees."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from sparsecast.collect.errors import InputError
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.emulate import Emulator
from sparsecast.export.reader import GGUFFile, _values
from sparsecast.export.run import export
from sparsecast.export.verify import bundle_file, verify
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.mlp import Predictor

DTYPES = ("f16", "q8_0", "q4_0")


def test_blocks_are_read_as_ggml_lays_them_out():
    scale = np.float16(0.5).tobytes()
    q8 = scale + bytes(range(16)) + bytes(range(240, 256))
    want = 0.5 * torch.tensor([*range(16), *range(-16, 0)])
    assert torch.equal(_values(torch.tensor([*q8], dtype=torch.uint8)[None])[0], want)
    q4 = scale + bytes(low | (15 - low) << 4 for low in range(16))
    want = 0.5 * torch.tensor([*range(-8, 8), *range(7, -9, -1)])
    assert torch.equal(_values(torch.tensor([*q4], dtype=torch.uint8)[None])[0], want)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_values_are_the_gguf_packages(kind):
    raw = np.random.default_rng(0).integers(0, 256, (50, 34 if kind == "Q8_0" else 18), np.uint8)
    raw[:, 1] &= 0x3B  # no scale that is NaN or infinite
    want = dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(_values(torch.from_numpy(raw)).numpy(), want)


def test_the_file_holds_the_predictors_own_values(quantised):
    file = GGUFFile(bundle_file(quantised))
    predictors = load_predictors(quantised / "predictor")
    for i, (predictor, dtype) in enumerate(zip(predictors.layers, DTYPES, strict=True)):
        assert predictor.dtype == dtype
        for short, weight in zip(("fc1", "fc2"), predictor.weights, strict=True):
            name = f"blk.{i}.{short}.weight"
            assert file.entries[name].type.name == dtype
            assert torch.equal(file.tensor(name).float(), weight.float())
        nbytes = sum(file.entries[f"blk.{i}.{short}.weight"].nbytes for short in ("fc1", "fc2"))
        assert nbytes == predictor.nbytes


@pytest.mark.parametrize("layer", range(3), ids=DTYPES)
def test_decisions_of_the_file_are_the_predictors_own(layer, quantised, acts):
    """On recorded inputs, as the emulated engine computes them from the file."""
    file = GGUFFile(bundle_file(quantised))
    emulator = Emulator(file)
    predictor = load_predictors(quantised / "predictor").layers[layer]
    x_TD = acts.rows("held-out", 0, layer).x_TD.float()
    hidden_TR = emulator._product(x_TD, f"blk.{layer}.fc1.weight").relu()
    theirs_TF = emulator._product(hidden_TR, f"blk.{layer}.fc2.weight")
    ours_TF = predictor.logits(x_TD)
    different = (theirs_TF >= 0) != (ours_TF >= 0)
    assert different.float().mean() <= 1e-4
    scale = ours_TF.abs().mean()
    assert not different.any() or ours_TF[different].abs().max() < 1e-2 * scale
    assert 0.05 < (ours_TF >= 0).float().mean() < 0.95


def test_a_quantised_bundle_verifies_and_its_damage_is_named(quantised, corpus, tmp_path):
    def check(bundle):
        result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), tokens=256))
        return {c.name: c.detail for c in result.checks if not c.ok}

    assert check(quantised) == {}
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in quantised.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(quantised)).parent.mkdir(exist_ok=True)
            (copy / path.relative_to(quantised)).write_bytes(path.read_bytes())
    path = bundle_file(copy)
    raw = bytearray(path.read_bytes())
    at = GGUFFile(path).entries["blk.2.fc2.weight"].start + 18 * 100 + 5
    raw[at] ^= 0x10
    path.write_bytes(raw)
    assert check(copy)["predictor folder"] == "blk.2.fc2.weight differs from model_2.pt"
    raw[at] ^= 0x10
    path.write_bytes(raw)
    manifest = (copy / "predictor" / "manifest.json").read_text()
    (copy / "predictor" / "manifest.json").write_text(manifest.replace('"q8_0"', '"f16"'))
    assert "blk.1.fc1.weight is q8_0, manifest.json has f16" in check(copy)["predictor folder"]


def test_rows_that_are_no_whole_blocks_are_refused(model_folder, tmp_path):
    layer = Predictor(torch.zeros(16, 64), torch.zeros(1280, 16), "f16")
    PredictorSet([layer] * 3, 0.0, None).save(tmp_path / "p")
    made = load_predictors(tmp_path / "p")
    odd = Predictor(*made.layers[0].weights, "q4_0")
    with pytest.raises(InputError, match="the rank is 16; choose a multiple of 32"):
        list(_part(PredictorSet([odd] * 3, 0.0, None)))


def _part(predictors):
    from sparsecast.export.model_gguf import _predictor_part

    return _predictor_part(predictors)


def test_the_card_names_the_formats(quantised, model_folder, tmp_path):
    card = (quantised / "README.md").read_text()
    assert "predictors in f16/q4_0/q8_0" in card
    out = tmp_path / "b"
    export(
        ExportConfig(
            model=str(model_folder), predictors=quantised / "predictor", out=out, dtype="f32"
        )
    )
    assert "predictors f16/q4_0/q8_0) the mean traffic" in (out / "README.md").read_text()
