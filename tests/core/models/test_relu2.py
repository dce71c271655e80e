"""Models with ReLU²: what float16 makes of a square, and every stage up to evaluate."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.recorder import Recorder
from sparsecast.predictors.baselines.svd import gate_of
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.config import EvaluateConfig, ReportConfig, TrainConfig
from sparsecast.predictors.evaluate import evaluate
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.report.run import report
from sparsecast.predictors.train import train


def collected(folder, corpus, out, **changes):
    base = {"tokens": 600, "seq_len": 128, "batch_size": 2, "device": "cpu"}
    return collect(CollectConfig(model=str(folder), corpus=str(corpus), out=out, **base | changes))


def scaled_copy(folder, copy, name: str, factor: float):
    """A copy of a model, one of its tensors multiplied."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights[name] = weights[name] * factor
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_a_square_that_underflows_is_a_zero_of_the_model(family_folder):
    model, _ = load_model(str(family_folder("arcee")), device="cpu", dtype="float16")
    up = model.model.layers[1].mlp.up_proj
    up.weight.data.mul_(1e-3)
    pre, x1 = [], []
    up.register_forward_hook(lambda *args: pre.append(args[2][0]))
    with torch.inference_mode(), Recorder(model, lambda _, x, y: x1.append(y), [1]):
        model(torch.randint(3, 512, (1, 100)))
    squared = pre[0].double().clamp_min(0).square()
    assert torch.equal(x1[0] != 0, squared > 2**-25)  # the half of float16's least number
    lost = (pre[0] > 0) & (x1[0] == 0)
    assert 0.01 < lost.double().mean() < 0.4


@pytest.mark.parametrize(
    ("layer", "match"),
    [(0, "layer 1: a predictor input is"), (2, "layer 2: an entry of x1 is inf")],
)
def test_a_square_that_overflows_names_bfloat16(layer, match, family_folder, corpus, tmp_path):
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    copy = scaled_copy(family_folder("arcee"), tmp_path / "m", name, 300.0)
    with pytest.raises(InputError, match=f"{match}.*--dtype bfloat16"):
        collected(copy, corpus, tmp_path / "a", dtype="float16")
    collected(copy, corpus, tmp_path / "b", dtype="bfloat16", tokens=100)


def test_evaluate_names_a_model_that_overflows(family_folder, corpus, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    copy = scaled_copy(family_folder("arcee"), tmp_path / "m", name, 300.0)
    layer = Predictor(torch.randn(8, 64).half(), torch.randn(136, 8).half())
    PredictorSet([layer] * 3, 0.0, None).save(tmp_path / "p")
    cfg = EvaluateConfig(
        model=str(copy),
        predictors=tmp_path / "p",
        corpus=str(corpus),
        tokens=100,
        seq_len=128,
        dtype="float16",
        device="cpu",
    )
    with pytest.raises(InputError, match=r"perplexity is nan in float16.*--dtype bfloat16"):
        evaluate(cfg)


@pytest.mark.parametrize(("name", "matrices"), [("nemotron", 2), ("bitnet", 3)])
def test_every_stage_up_to_evaluate(name, matrices, family_folder, corpus, tmp_path, capsys):
    folder = family_folder(name)
    acts = collected(folder, corpus, tmp_path / "acts", tokens=2_000, energy=True)
    assert (acts.manifest.activation, acts.manifest.activation_threshold) == ("relu2", 0.0)
    trained = TrainConfig(
        activations=acts.folder,
        out=tmp_path / "pred",
        model=str(folder),
        rank=32,
        epochs=1,
        target_perplexity=0.5,
        device="cpu",
    )
    train(trained)
    assert load_predictors(tmp_path / "pred").manifest.activation == "relu2"
    path = tmp_path / "evaluate.json"
    result = evaluate(
        EvaluateConfig(
            model=str(folder),
            predictors=tmp_path / "pred",
            corpus=str(corpus),
            tokens=400,
            seq_len=128,
            device="cpu",
            json=path,
        )
    )
    values = json.loads(path.read_text())
    assert values == result
    assert values["perplexity"]["bundle"] is None
    assert values["change"]["bundle"] is None
    assert values["perplexity"]["exact"] == pytest.approx(values["perplexity"]["dense"], rel=1e-4)
    assert 0 < abs(values["change"]["predicted"]) < 0.5
    said = " ".join(capsys.readouterr().err.split())
    assert "bundle │ - │" in said
    assert "bundle: not measured: PowerInfer runs neither ReLU²" in said

    scores = report(
        ReportConfig(
            predictors=tmp_path / "pred",
            activations=acts.folder,
            out=tmp_path / "report",
            evaluation=path,
        )
    )
    assert scores["perplexity_change"] == values["change"]["predicted"]
    assert scores["bundle_perplexity_change"] is None
    for file in ("report.md", "report.html"):
        assert "none for PowerInfer (bundle)" in (tmp_path / "report" / file).read_text()
    for row in scores["layers"]:
        m, p, s = matrices, row["predicted_sparsity"], row["true_sparsity"]
        share = 32 * (64 + 136) * 4.5 / (m * 64 * 136 * 16)
        fired = (m - 1) * (1 - s)
        assert row["traffic"] == pytest.approx(share + 1 - p)
        assert row["exact"] == pytest.approx((1 + fired) / m)
        assert row["cascade"] == pytest.approx(share + (1 - p + fired * row["recall"]) / m)
        assert row["oracle"] == pytest.approx(1 - s)
        assert 0.2 < s < 0.8


@pytest.mark.parametrize("name", ["nanochat", "nemotron", "persimmon"])
def test_baselines_fold_the_norm_that_the_family_has(name, family_folder):
    """On an input of mean 0, where a LayerNorm divides by the RMS."""
    model, _ = load_model(str(family_folder(name)), device="cpu")
    layer = model.model.layers[1]
    first = {"nanochat": "fc1", "nemotron": "up_proj", "persimmon": "dense_h_to_4h"}[name]
    x_TD = torch.randn(20, 64)
    x_TD -= x_TD.mean(1, keepdim=True)
    with torch.no_grad():
        want = layer.mlp.get_submodule(first)(layer.post_attention_layernorm(x_TD))
    weight_FD, constant_F = gate_of(model, 1)
    got = x_TD / x_TD.square().mean(1, keepdim=True).sqrt() @ weight_FD.T + constant_F
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
