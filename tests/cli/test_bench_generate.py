"""What `bench generate` times, and that it says which tokens came out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import ArceeConfig, ArceeForCausalLM, BitNetConfig, BitNetForCausalLM

from sparsecast.cli.bench.generate import BenchGenerateConfig, bench_generate
from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.core.text.tokens import encode
from sparsecast.kernels.in_models.decode import Decoder
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.predictor import Predictor


@pytest.fixture
def predictors(manifest_of, model_folder, tmp_path):
    """Half of the neurons at random, so that predicted tokens soon differ."""
    layers = [Predictor(torch.randn(8, 64).half(), torch.randn(1280, 8).half())] * 3
    fingerprint = Checkpoint(str(model_folder)).fingerprint
    calibration = [{"recall": 0.95, "predicted_sparsity": 0.5}] * 3
    manifest = manifest_of(layers, fingerprint=fingerprint, calibration=calibration)
    PredictorSet(layers, 0.0, manifest).save(tmp_path / "p")
    return tmp_path / "p"


@pytest.fixture
def cfg(model_folder, predictors, tmp_path):
    return BenchGenerateConfig(
        model=str(model_folder),
        predictors=predictors,
        tokens=12,
        rounds=2,
        device="cpu",
        json=tmp_path / "b.json",
    )


def test_every_policy_generates_and_is_compared(cfg, model_folder):
    values = bench_generate(cfg)

    assert json.loads(cfg.json.read_text()) == values
    rows = {row["policy"]: row for row in values["rows"]}
    assert list(rows) == ["dense", "exact", "predicted", "auto"]
    assert rows["dense"]["layers"] == {"dense": 3, "exact": 0, "predicted": 0}
    assert rows["exact"]["layers"] == {"dense": 0, "exact": 3, "predicted": 0}
    assert rows["predicted"]["layers"] == {"dense": 0, "exact": 0, "predicted": 3}
    assert rows["auto"]["layers"] == {"dense": 3, "exact": 0, "predicted": 0}
    equal = {name: row["equal_tokens"] for name, row in rows.items()}
    assert equal["dense"] == equal["exact"] == equal["auto"] == 12
    assert equal["predicted"] < 12
    assert all(len(row["runs"]) == 2 and min(row["runs"]) > 0 for row in values["rows"])
    assert values["device"] == "cpu"
    assert values["dtype"] == "float32"


@pytest.mark.parametrize(
    ("config", "model"),
    [(ArceeConfig, ArceeForCausalLM), (BitNetConfig, BitNetForCausalLM)],
    ids=["arcee", "bitnet"],
)
def test_a_model_with_relu2_generates(config, model, cfg, model_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    llama = Checkpoint(str(model_folder)).config.to_dict()
    same = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    same |= {"vocab_size", "max_position_embeddings", "initializer_range", "bos_token_id"}
    small = {name: llama[name] for name in same} | {"intermediate_size": 96, "pad_token_id": None}
    model(config(**small, eos_token_id=2, hidden_act="relu2")).save_pretrained(folder)
    layers = [Predictor(torch.randn(8, 64).half(), torch.randn(96, 8).half())] * 3
    PredictorSet(layers, 0.0, None).save(tmp_path / "q")

    changed = {"model": str(folder), "predictors": tmp_path / "q", "rounds": 1}
    rows = bench_generate(replace(cfg, **changed, policies=["exact", "predicted"]))["rows"]

    assert [row["equal_tokens"] for row in rows[:2]] == [12, 12]
    assert rows[2]["layers"] == {"dense": 0, "exact": 0, "predicted": 3}


@pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")
def test_the_tokens_are_those_of_generate(cfg, model_folder):
    """Nothing is called as transformers is about to forbid."""
    model, tokenizer = load_model(str(model_folder), device="cpu")
    ids = torch.tensor([encode(tokenizer, cfg.prompt, 99)])
    assert ids[0, 0] == tokenizer.bos_token_id
    want = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    decoder = Decoder(model, ids[0], 12)
    assert decoder.run()[0] == decoder.run()[0] == want[0, ids.shape[1] :].tolist()
    assert bench_generate(cfg)["prompt_tokens"] == ids.shape[1]
    assert bench_generate(replace(cfg, prompt="", policies=["exact"]))["prompt_tokens"] == 1


def test_what_cannot_be_compared_is_told(cfg, predictors, tmp_path, sealed):
    with pytest.raises(InputError, match="--policies: got 'dense', expected exact, predicted"):
        replace(cfg, policies=["exact", "dense"])
    with pytest.raises(InputError, match="--tokens: must be at least 2, got 1"):
        replace(cfg, tokens=1)
    told = r"--tokens: got 300, but .* made for 256 positions .* choose at most 2\d\d, or a shorter"
    with pytest.raises(InputError, match=told):
        bench_generate(replace(cfg, tokens=300))
    with pytest.raises(
        InputError, match=r"trained for fatrelu\(0.2\) in the FFN, but .* fatrelu\(0.7"
    ):
        bench_generate(replace(cfg, activation_threshold=0.7))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "m.powerinfer.gguf").touch()
    with pytest.raises(InputError, match="is a bundle"):
        bench_generate(replace(cfg, predictors=tmp_path / "b"))
    manifest = json.loads((predictors / "manifest.json").read_text())
    (predictors / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "1" * 16}))
    sealed(predictors)
    with pytest.raises(InputError, match=r"/p: was trained for .* \(fingerprint 1111"):
        bench_generate(cfg)
