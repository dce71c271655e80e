"""Models, predictors and activations that export refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.errors import InputError
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.run import export
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors


@pytest.fixture
def model(model_folder, tmp_path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change_config(model: Path, drop: tuple[str, ...] = (), **new: object) -> None:
    path = model / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(config | new))


def change_weights(model: Path, change) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def run(model: Path, predictors: Path, **options: object) -> GGUFFile:
    out = model.parent / "bundle"
    return GGUFFile(
        export(ExportConfig(model=str(model), predictors=predictors, out=out, **options))
    )


def bias(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.float16)


def q_norm(weights):
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16, dtype=torch.float16)


def infinite(weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.full((1280, 64), 7e4)


def lose(weights):
    del weights["model.layers.2.mlp.up_proj.weight"]


def wrong_shape(weights):
    weights["model.norm.weight"] = torch.ones(63, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (bias, "q_proj.bias, but the engine's llama has no bias there"),
        (q_norm, "q_norm.weight, but the engine's llama has no tensor of that name"),
        (infinite, r"blk\.1\.ffn_up\.weight: holds 70000"),
        (lose, r"layers\.2\.mlp\.up_proj\.weight is missing"),
        (wrong_shape, r"model\.norm\.weight is \[63\], but config.json describes \[64\]"),
    ],
)
def test_weights_the_engine_cannot_express_are_refused(model, anyones, change, reason):
    change_weights(model, change)

    with pytest.raises(InputError, match=reason):
        run(model, anyones)
    assert not (model.parent / "bundle").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_act": "silu"}, "no exact zeros"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2': its attention has biases"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3': it normalizes q and k"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type is 'dynamic'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope type is 'llama3'",
        ),
        ({"vocab_size": 300}, "512 pieces, but the model's embedding has 300|is .512, 64"),
    ],
)
def test_configs_the_engine_cannot_express_are_refused(model, anyones, config, reason):
    drop = ("rope_parameters",) if "rope_scaling" in config else ()
    change_config(model, drop, **config)

    with pytest.raises(InputError, match=reason):
        run(model, anyones)


def test_a_narrow_ffn_is_refused(model, anyones):
    config = LlamaConfig.from_pretrained(model)
    config.intermediate_size = 1000
    config.hidden_act = "relu"
    LlamaForCausalLM(config).save_pretrained(model)

    with pytest.raises(InputError, match="1000 wide, expected more than 1000"):
        run(model, anyones)


def test_a_unigram_vocabulary_is_refused(model, anyones, corpus):
    lines = (line for path in corpus.iterdir() for line in path.read_text().splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(model / "tokenizer"),
        vocab_size=512,
        model_type="unigram",
        byte_fallback=True,
        minloglevel=2,
    )

    with pytest.raises(InputError, match="unigram"):
        run(model, anyones)


def rules_of(name):
    """The compiled rules of one of sentencepiece's normalizations."""
    trained = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 20),
        model_writer=trained,
        vocab_size=12,
        model_type="bpe",
        normalization_rule_name=name,
        minloglevel=2,
    )
    spec = proto.ModelProto()
    spec.ParseFromString(trained.getvalue())
    return spec.normalizer_spec.precompiled_charsmap


@pytest.mark.parametrize("change", [{"name": "nmt_nfkc"}, {"add_dummy_prefix": False}])
def test_a_vocabulary_that_prepares_text_otherwise_is_refused(model, anyones, change):
    path = model / "tokenizer.model"
    spec = proto.ModelProto()
    spec.ParseFromString(path.read_bytes())
    for name, value in change.items():
        setattr(spec.normalizer_spec, name, value)
    if "name" in change:
        spec.normalizer_spec.precompiled_charsmap = rules_of(change["name"])
    path.write_bytes(spec.SerializeToString())

    with pytest.raises(InputError, match="prepares text by .*--allow-other-tok"):
        run(model, anyones)


def test_predictors_of_another_model_are_refused(model, predictors):
    change_weights(model, lambda weights: weights["model.norm.weight"].mul_(2))

    with pytest.raises(InputError, match="fingerprint"):
        run(model, predictors)


def test_predictors_of_another_shape_are_refused(model, anyones):
    layers = load_predictors(anyones).layers
    PredictorSet([replace(p, fc2_FR=p.fc2_FR[:1024]) for p in layers], 0.0, None).save(anyones)

    with pytest.raises(InputError, match=r"model_0\.pt has fc1 \(16, 64\) and fc2 \(1024, 16\)"):
        run(model, anyones)


def test_activations_of_another_model_are_refused(model, anyones, acts):
    change_weights(model, lambda weights: weights["model.norm.weight"].mul_(2))

    with pytest.raises(InputError, match="was recorded from"):
        run(model, anyones, activations=acts.folder)


def test_activations_in_which_nothing_fires_are_refused(model, predictors, acts, edit_store):
    def silence(tensors):
        for name in tensors:
            if name.endswith("mask"):
                tensors[name].zero_()

    silent = edit_store(acts, model.parent / "acts", silence)
    with pytest.raises(InputError, match="nothing fires in any layer on 6,000 tokens"):
        run(model, predictors, activations=silent.folder)
    assert sorted(p.name for p in model.parent.iterdir()) == ["acts", "model"]


def test_activations_at_another_threshold_are_refused(model, predictors, acts, edit_store):
    other = edit_store(acts, model.parent / "acts", lambda _: None, activation_threshold=0.3)
    with pytest.raises(
        InputError, match=r"with fatrelu\(0\.3\), but the export uses fatrelu\(0\.2\)"
    ):
        run(model, predictors, activations=other.folder)


def test_predictors_are_no_activations(model, predictors):
    with pytest.raises(InputError, match="holds predictors .*; expected activations"):
        run(model, predictors, activations=predictors)


def test_quantized_weights_and_an_index_that_lies_are_refused(model, anyones, tmp_path):
    """Without a look at the dtype int8 codes would be written as if they were weights."""
    whole = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(model, lambda weights: weights.update({name: weights[name].to(torch.int8)}))
    with pytest.raises(InputError, match=f"{name} is int8, expected float32"):
        run(model, anyones)
    change_config(model, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(InputError, match="quantized \\(bitsandbytes\\)"):
        run(model, anyones)

    change_config(model, drop=("quantization_config",))
    (model / "model.safetensors").rename(model / "a.safetensors")
    save_file({"spare.weight": whole["lm_head.weight"]}, model / "b.safetensors")
    places = {"weight_map": dict.fromkeys(whole, "a.safetensors") | {name: "b.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(places))
    with pytest.raises(InputError, match=f"b.safetensors: tensor {name} is not in it, but the ind"):
        run(model, anyones)


def test_an_output_matrix_of_its_own_under_a_config_that_ties_it_is_refused(model, anyones):
    """transformers computes with it; the embedding in its place would be another model."""
    change_config(model, tie_word_embeddings=True)
    with pytest.raises(InputError, match="lm_head.weight is not model.embed_tokens.weight, but"):
        run(model, anyones)

    def copy(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(model, copy)
    file = run(model, anyones)
    assert torch.equal(file.tensor("output.weight"), file.tensor("token_embd.weight"))
