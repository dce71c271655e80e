"""What is recorded, against forward passes written by hand for every family.

The oracles read the checkpoint's tensors and nothing of ours or of transformers' modules: norms,
projections and activations are spelled out below. Only the residual stream comes from the model.

Shape letters: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.bitmask import unpack
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.predictors.model_in_loop import exact_in_loop

GEMMAS = ["gemma", "gemma2", "gemma3_text"]
GATED = ["llama", "llama-fatrelu", "mistral", "qwen2", "qwen3", "sparsellama", "bamboo", "minicpm"]
SQUARED = ["arcee", "nemotron", "jais2", "nanochat", "persimmon", "bitnet"]
NAMES = [*GATED, "ernie4_5", "olmo", "seed_oss", "smollm3", *GEMMAS, "opt", "falcon-7b"]
NAMES += ["falcon-40b", *SQUARED]
LAYER = {"opt": "model.decoder.layers.{}.", "falcon-7b": "transformer.h.{}."}
LAYER["falcon-40b"] = LAYER["falcon-7b"]
FIRST = {
    "arcee": "mlp.up_proj",
    "nemotron": "mlp.up_proj",
    "jais2": "mlp.up_proj",
    "nanochat": "mlp.fc1",
    "persimmon": "mlp.dense_h_to_4h",
}
"""The first projection of those with ReLU² and no gate."""
LAST = {
    "opt": "fc2",
    "falcon-7b": "mlp.dense_4h_to_h",
    "falcon-40b": "mlp.dense_4h_to_h",
    "nanochat": "mlp.fc2",
    "persimmon": "mlp.dense_4h_to_h",
    "bitnet": "mlp.ffn_sub_norm",
}
"""The module that reads x1, where it is not down_proj."""
NORM = {name: "pre_feedforward_layernorm" for name in ("gemma2", "gemma3_text")}
"""The FFN norm of those with names like Llama's, where it is not post_attention_layernorm."""


def rms_norm(x_TD, weight_D, eps=1e-5):
    return x_TD / (x_TD.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight_D


def layer_norm(x_TD, weight_D, bias_D):
    centered = x_TD - x_TD.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight_D + bias_D


def gate_and_x1(name: str, weights: dict, layer: int, x_TD: torch.Tensor):
    """(what the activation sees (T, F), x1 (T, F)) from the predictor's input, in float64."""
    prefix = LAYER.get(name, "model.layers.{}.").format(layer)
    w = {k.removeprefix(prefix): v.double() for k, v in weights.items() if k.startswith(prefix)}
    x_TD = x_TD.double()
    if name == "opt":
        normed = layer_norm(x_TD, w["final_layer_norm.weight"], w["final_layer_norm.bias"])
        pre = normed @ w["fc1.weight"].T + w["fc1.bias"]
        return pre, pre.clamp_min(0)
    if name.startswith("falcon"):
        norm = "ln_mlp" if name == "falcon-40b" else "input_layernorm"
        normed = layer_norm(x_TD, w[f"{norm}.weight"], w[f"{norm}.bias"])
        pre = normed @ w["mlp.dense_h_to_4h.weight"].T
        return pre, pre.clamp_min(0)
    if name in FIRST:
        weight, bias = (w.get(f"post_attention_layernorm.{part}") for part in ("weight", "bias"))
        if name == "nemotron":
            normed = layer_norm(x_TD, weight + 1, bias)
        elif name in ("jais2", "persimmon"):
            normed = layer_norm(x_TD, weight, bias)
        elif name == "nanochat":
            normed = rms_norm(x_TD, 1.0, eps=1e-6)
        else:
            normed = rms_norm(x_TD, weight)
        pre = normed @ w[f"{FIRST[name]}.weight"].T + w.get(f"{FIRST[name]}.bias", 0.0)
        return pre, pre.clamp_min(0).square()
    if name == "olmo":
        normed = layer_norm(x_TD, 1.0, 0.0)
    else:
        weight = w[f"{NORM.get(name, 'post_attention_layernorm')}.weight"]
        normed = rms_norm(x_TD, weight + 1 if name in GEMMAS else weight)
    gate = normed @ w["mlp.gate_proj.weight"].T
    up = normed @ w["mlp.up_proj.weight"].T
    if name == "bitnet":
        return gate, gate.clamp_min(0).square() * up
    if name == "bamboo":
        return torch.minimum(gate, up), gate.clamp_min(0) * up.clamp_min(0)
    threshold = 0.2 if name in ("llama-fatrelu", "sparsellama", "minicpm") else 0.0
    return gate - threshold, torch.where(gate >= threshold, gate, 0) * up


def config(folder, corpus, out, **changes):
    base = {"tokens": 600, "seq_len": 128, "batch_size": 2, "device": "cpu"}
    return CollectConfig(model=str(folder), corpus=str(corpus), out=out, **{**base, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_recorded_inputs_explain_recorded_masks(name, family_folder, corpus, tmp_path):
    """In float32 every entry agrees but those within rounding of the threshold."""
    folder = family_folder(name)
    store = collect(config(folder, corpus, tmp_path / "acts", input_dtype="float32"))
    weights = load_file(folder / "model.safetensors")
    made = store.manifest

    for layer in made.layers:
        rows = store.rows("train", 0, layer)
        edge_TF, x1_TF = gate_and_x1(name, weights, layer, rows.x_TD)
        fired_TF = unpack(rows.mask_TP, made.ffn_width)

        different = (x1_TF != 0) != fired_TF
        assert edge_TF[different].abs().max().item() < 1e-5 if different.any() else True
        assert different.float().mean() < 1e-4
        assert 0.1 < fired_TF.float().mean() < 0.9
    two = name in FIRST or name == "opt" or name.startswith("falcon")
    assert made.ffn_matrices == (2 if two else 3)
    convention = "layer-input" if name.startswith("falcon") else "residual-before-ffn-norm"
    assert made.convention == convention


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_bit_for_bit_those_of_a_dense_forward(name, family_folder, corpus, tmp_path):
    """On the same batches, one document each; and the model's own norm and projections, applied to
    the recorded input of a document, give that very mask again."""
    folder = family_folder(name)
    store = collect(config(folder, corpus, tmp_path / "a", input_dtype="float32", batch_size=1))
    model, _ = load_model(str(folder), device="cpu")
    layer = model.get_submodule(LAYER.get(name, "model.layers.{}.").format(1).rstrip("."))
    seen: list[torch.Tensor] = []
    hook = layer.get_submodule(LAST.get(name, "mlp.down_proj")).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    ids, position = store.tokens("train", 0)
    starts = [*(position == 0).nonzero().flatten().tolist(), len(ids)]
    rows = store.rows("train", 0, 1)
    again = []
    with torch.inference_mode():
        for start, stop in zip(starts, starts[1:], strict=False):
            model(ids[None, start:stop].long())
        hook.remove()
        for start, stop in zip(starts, starts[1:], strict=False):
            again.append(own_x1(name, layer, rows.x_TD[start:stop]))

    fired_TF = unpack(rows.mask_TP, store.manifest.ffn_width)
    assert len(starts) > 3
    assert torch.equal(torch.cat(seen) != 0, fired_TF)
    assert torch.equal(torch.cat(again) != 0, fired_TF)


def own_x1(name: str, layer: torch.nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """x1 by the layer's own modules."""
    if name == "opt":
        return layer.activation_fn(layer.fc1(layer.final_layer_norm(x_TD)))
    if name.startswith("falcon"):
        norm = layer.ln_mlp if name == "falcon-40b" else layer.input_layernorm
        return layer.mlp.act(layer.mlp.dense_h_to_4h(norm(x_TD)))
    normed = layer.get_submodule(NORM.get(name, "post_attention_layernorm"))(x_TD)
    if name in FIRST:
        return layer.get_submodule(FIRST[name])(normed).relu().square()
    return layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "opt", "falcon-40b", "bamboo"])
def test_stored_dtypes_round_inputs_and_nothing_else(
    name, x_dtype, family_folder, corpus, tmp_path
):
    folder = family_folder(name)
    exact = collect(config(folder, corpus, tmp_path / "f32", input_dtype="float32"))
    rounded = collect(config(folder, corpus, tmp_path / "r", input_dtype=x_dtype))
    step = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0}[x_dtype]
    weights = load_file(folder / "model.safetensors")

    for layer in range(3):
        want, got = exact.rows("train", 0, layer), rounded.rows("train", 0, layer)
        assert torch.equal(want.mask_TP, got.mask_TP)
        error = (got.x_TD.float() - want.x_TD).abs()
        scale_T1 = want.x_TD.abs().amax(1, keepdim=True)
        bound = want.x_TD.abs() * step + (1e-7 if step else 0.5001 / 127 * scale_T1)
        assert (error <= bound).all()
        edge_TF, x1_TF = gate_and_x1(name, weights, layer, got.x_TD.float())
        same_TF = (x1_TF != 0) == unpack(got.mask_TP, rounded.manifest.ffn_width)
        tolerance = {"float16": 0.9998, "bfloat16": 0.999, "int8": 0.997}[x_dtype]
        assert same_TF.float().mean() > tolerance


def test_minicpm_is_the_llama_with_its_scales_folded_in(family_folder):
    """The fold of published converters, in LlamaForCausalLM, gives the same logits."""
    folder = family_folder("minicpm")
    weights = load_file(folder / "model.safetensors")
    folded = dict(weights)
    folded["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * 12
    folded["lm_head.weight"] = weights["model.embed_tokens.weight"] / (64 / 16)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            folded[name] = weight * (1.4 / math.sqrt(3))
    model, _ = load_model(str(folder), device="cpu")
    fields = {k: getattr(model.config, k) for k in ("hidden_size", "intermediate_size")}
    llama = LlamaForCausalLM(
        LlamaConfig(
            **fields,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            hidden_act="relu",
        )
    )
    llama.load_state_dict(folded)
    for layer in llama.model.layers:
        layer.mlp.act_fn = torch.nn.Threshold(0.2, 0)  # no gate is 0.2 exactly
    ids = torch.randint(3, 512, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(
            model(ids).logits, llama.eval()(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_weights_in_torchs_format_are_read_without_code(family_folder, tmp_path):
    folder = family_folder("sparsellama")
    copy = tmp_path / "bin"
    copy.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(folder / "model.safetensors"), copy / "pytorch_model.bin")

    ours, _ = load_model(str(copy), device="cpu")
    theirs, _ = load_model(str(folder), device="cpu")

    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_threshold_lost_in_conversion_is_pointed_out(family_folder, tmp_path, capfd):
    folder = family_folder("llama")
    copy = tmp_path / "minicpm-llama-format"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace("{", '{"scale_emb": 12, ', 1))

    load_model(str(copy), device="cpu")
    assert "--activation-threshold 0.03" in " ".join(capfd.readouterr().err.split())
    model, _ = load_model(str(copy), device="cpu", activation_threshold=0.03)
    assert "MiniCPM" not in capfd.readouterr().err
    assert model.model.layers[2].mlp.act_fn.threshold == 0.03


@pytest.mark.parametrize(
    ("name", "old", "new", "match"),
    [
        ("opt", '"do_layer_norm_before": true', '"do_layer_norm_before": false', "FFN norm behind"),
        ("falcon-7b", '"parallel_attn": true', '"parallel_attn": false', "parallel_attn is false"),
        ("llama", '"model_type": "llama"', '"model_type": "gpt2"', "expected one of arcee, bamboo"),
        ("llama", '"model_type": "llama"', '"model_type": "newllm"', "FAMILIES in sparsecast"),
        ("minicpm", '"scale_depth": 1.4', '"scale_depth": null', "needs numbers under scale_emb"),
        ("bamboo", '"hidden_act": "relu"', '"hidden_act": "silu"', "expected 'relu' in a model of"),
        ("opt", '"activation_function": "relu"', '"activation_function": "gelu"', "no exact zeros"),
    ],
)
def test_what_cannot_be_recorded_is_refused(name, old, new, match, family_folder, tmp_path):
    folder = family_folder(name)
    copy = tmp_path / name
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    text = (copy / "config.json").read_text()
    assert old in text
    (copy / "config.json").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=match):
        load_model(str(copy), device="cpu")


@pytest.mark.parametrize("name", ["llama", "sparsellama", "falcon-40b"])
def test_weights_that_do_not_fill_the_model_are_refused(name, family_folder, tmp_path, capfd):
    """transformers would fill them with random numbers."""
    copy = tmp_path / name
    shutil.copytree(family_folder(name), copy)
    whole = load_file(copy / "model.safetensors")
    last = max(key for key in whole if ".2." in key)

    def load(weights: dict) -> None:
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        load_model(str(copy), device="cpu")

    with pytest.raises(InputError, match=f"tensor {re.escape(last)} is missing"):
        load({key: value for key, value in whole.items() if key != last})
    with pytest.raises(InputError, match=f"tensor {re.escape(last)} is .*, but config.json"):
        load(whole | {last: whole[last][:-1].clone()})
    load(whole | {"model.layers.0.surprise": torch.zeros(2)})
    told = " ".join(capfd.readouterr().err.split())
    assert "1 tensors have no place" in told
    assert "surprise first" in told


def test_what_is_not_plain_weights_is_refused(family_folder, tmp_path):
    copy = tmp_path / "llama"
    shutil.copytree(family_folder("llama"), copy)
    whole = load_file(copy / "model.safetensors")
    gate = "model.layers.1.mlp.gate_proj.weight"
    save_file(whole | {gate: whole[gate].to(torch.int8)}, copy / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {re.escape(gate)} is int8, expected float32"):
        load_model(str(copy), device="cpu")
    save_file(whole, copy / "model.safetensors", {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (copy / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(InputError, match=r"its weights are quantized \(gptq\)"):
        load_model(str(copy), device="cpu")
    (copy / "config.json").write_text(json.dumps(config | {"num_attention_heads": "many"}))
    with pytest.raises(InputError, match="num_attention_heads is 'many', expected a whole number"):
        load_model(str(copy), device="cpu")
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1, "use_cache": "?"}))
    with pytest.raises(InputError, match="transformers cannot read it"):
        load_model(str(copy), device="cpu")


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ([], "an object of tensor names and files"),
        ({"model.norm.weight": 3}, "an object of tensor names and files"),
        ({}, "an object of tensor names and files"),
        ({"ghost.weight": "a.safetensors"}, "ghost.weight is not in it, but the index says so"),
        ({"x": "gone.safetensors"}, "gone.safetensors: no such file, but model.safetensors.index"),
    ],
)
def test_an_index_that_lies_is_named(weight_map, match, family_folder, tmp_path):
    copy = tmp_path / "llama"
    shutil.copytree(family_folder("llama"), copy)
    index = {"weight_map": weight_map}
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=match):
        load_model(str(copy), device="cpu")


def test_a_bin_file_without_tensors_and_a_broken_tokenizer_are_named(family_folder, tmp_path):
    copy = tmp_path / "llama"
    shutil.copytree(family_folder("llama"), copy)
    (copy / "tokenizer.json").write_text('{"model": {"type": "Riddle"}}')
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_model(str(copy), device="cpu")
    (copy / "model.safetensors").unlink()
    torch.save([torch.zeros(2)], copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="does not hold a dict of tensors"):
        load_model(str(copy), device="cpu")


@pytest.mark.parametrize(
    "name", ["opt", "falcon-40b", "bamboo", "minicpm", "persimmon", "bitnet", *GEMMAS]
)
def test_the_exact_sparse_ffn_is_the_dense_one(name, family_folder):
    """`evaluate` runs it on every family: the same logits from what fired alone."""
    model, _ = load_model(str(family_folder(name)), device="cpu")
    ids = torch.randint(3, 512, (2, 30))
    with torch.inference_mode():
        dense = model(ids).logits
        with exact_in_loop(model):
            exact = model(ids).logits
        again = model(ids).logits
    torch.testing.assert_close(exact, dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, dense)
