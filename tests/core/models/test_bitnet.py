"""BitNet: the norm between x1 and down, and linear layers that round in every forward pass."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.bitmask import unpack
from sparsecast.core.errors import InputError
from sparsecast.core.models.bitnet import check_compiles
from sparsecast.core.models.families import family_of
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.recorder import Recorder
from sparsecast.kernels.in_models.sparsify import sparsify_model
from sparsecast.predictors.baselines.label_clipping import ClippedStore
from sparsecast.predictors.baselines.svd import gate_of
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.model_in_loop import exact_in_loop, predictors_in_loop
from sparsecast.predictors.predictor import Predictor

NAMES = ["bitnet", "bitnet-online"]


@pytest.fixture(autouse=True)
def _eager():
    """Without torch.compile, which takes 20 seconds; a slow test runs with it."""
    with torch.compiler.set_stance("force_eager"):
        yield


def rms_norm(x_TD, weight_D):
    return x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight_D


def ternary(weight):
    scale = weight.abs().mean()
    return (weight / scale).round().clamp(-1, 1) * scale


def eight_bits(x_TD):
    step = x_TD.abs().amax(-1, keepdim=True) / 127
    return (x_TD / step).round().clamp(-128, 127) * step


class ByHand:
    """One layer's FFN from the checkpoint's tensors, in float64."""

    def __init__(self, folder, layer: int, online: bool) -> None:
        prefix = f"model.layers.{layer}."
        weights = load_file(folder / "model.safetensors")
        w = {k.removeprefix(prefix): v.double() for k, v in weights.items() if prefix in k}
        self.norm = w["post_attention_layernorm.weight"]
        self.sub_norm = w["mlp.ffn_sub_norm.weight"]
        weigh = ternary if online else lambda weight: weight
        names = ("gate_proj", "up_proj", "down_proj")
        self.gate, self.up, self.down = (weigh(w[f"mlp.{name}.weight"]) for name in names)
        self.enter = eight_bits if online else lambda x: x

    def x1(self, x_TD):
        normed = self.enter(rms_norm(x_TD.double(), self.norm))
        return (normed @ self.gate.T).clamp_min(0).square() * (normed @ self.up.T)

    def out(self, x1_TF):
        return self.enter(rms_norm(x1_TF.double(), self.sub_norm)) @ self.down.T


def close(got, want) -> float:
    """Share of tokens whose entries are all near; rounding to 8 bits moves the others a step."""
    near = (got - want).abs() <= 1e-4 * want.abs().amax(-1, keepdim=True)
    return near.all(-1).double().mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_the_ffn_is_the_one_written_by_hand(name, family_folder):
    folder = family_folder(name)
    model, _ = load_model(str(folder), device="cpu")
    rounds = isinstance(model.model.layers[0].mlp.down_proj, AutoBitLinear)
    assert rounds == (name == "bitnet-online")
    hand = ByHand(folder, 1, rounds)
    seen, outs = [], []
    model.model.layers[1].mlp.register_forward_hook(lambda *args: outs.append(args[2][0]))
    with torch.inference_mode(), Recorder(model, lambda _, *pair: seen.append(pair), [1]):
        model(torch.randint(3, 512, (1, 200)))
    (x_TD, x1_TF), (out_TD,) = seen[0], outs
    least = 0.97 if rounds else 1
    assert close(x1_TF, hand.x1(x_TD)) >= least
    # Sums of whole numbers are often 0, which float32 may miss by a rounding error.
    same = ((x1_TF != 0) == (hand.x1(x_TD) != 0)).double().mean()
    assert same > (0.998 if rounds else 0.9999)
    assert close(out_TD, hand.out(x1_TF)) >= least
    assert close(out_TD, ByHand(folder, 1, not rounds).out(x1_TF)) < 0.1
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 512, (2, 20))
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_in_front_of_the_norm(name, family_folder):
    """The norm sees only what was predicted, so its mean square is that of the kept entries."""
    folder = family_folder(name)
    model, _ = load_model(str(folder), device="cpu")
    predictors = PredictorSet([Predictor(torch.randn(8, 64), torch.randn(136, 8))] * 3, 0.0, None)
    hand = ByHand(folder, 2, name == "bitnet-online")
    layer, seen = model.model.layers[2], {}
    layer.post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: seen.update(x=args[0][0])
    )
    layer.mlp.register_forward_hook(lambda *args: seen.update(out=args[2][0]))
    with torch.inference_mode(), predictors_in_loop(model, predictors):
        model(torch.randint(3, 512, (1, 200)))
    fc1, fc2 = (weight.double() for weight in predictors.layers[2].weights)
    kept = (seen["x"].double() @ fc1.T).clamp_min(0) @ fc2.T >= 0
    x1_TF = hand.x1(seen["x"])
    assert 0.2 < kept.double().mean() < 0.8
    assert close(seen["out"], hand.out(x1_TF * kept)) > 0.9
    behind = hand.enter(rms_norm(x1_TF, hand.sub_norm) * kept) @ hand.down.T
    assert close(seen["out"], behind) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_sparse_ffn_applies_the_norm(name, family_folder):
    folder = family_folder(name)
    model, _ = load_model(str(folder), device="cpu")
    hand = ByHand(folder, 0, name == "bitnet-online")
    x_TD, got = torch.randn(200, 64), {}
    with torch.inference_mode():
        normed = model.model.layers[0].post_attention_layernorm(x_TD)
        dense = model.model.layers[0].mlp(normed)
        with exact_in_loop(model):
            got = model.model.layers[0].mlp(normed)
    least = 0.9 if name == "bitnet-online" else 1
    assert close(got, dense) >= least
    assert close(got, hand.out(hand.x1(x_TD))) >= least


@pytest.mark.parametrize("name", NAMES)
def test_energies_are_of_the_columns_behind_the_norm(name, family_folder, corpus, tmp_path):
    folder = family_folder(name)
    cfg = CollectConfig(
        model=str(folder),
        corpus=str(corpus),
        out=tmp_path / "a",
        tokens=300,
        seq_len=128,
        input_dtype="float32",
        energy=True,
        device="cpu",
    )
    store = collect(cfg)
    hand = ByHand(folder, 1, name == "bitnet-online")
    column_F = hand.down.square().sum(0).sqrt()
    rows = store.rows("train", 0, 1)
    fired_TF = unpack(rows.mask_TP, 136)
    want_TF = (rms_norm(hand.x1(rows.x_TD), hand.sub_norm) * column_F).abs()
    got_TF = store.energies("train", 0, 1).double().sqrt()
    inside = fired_TF & (want_TF > 2.0**-17) & (want_TF < 2.0**13)
    ratio = got_TF[inside] / want_TF[inside]
    assert inside.sum() > 0.98 * fired_TF.sum()
    assert ((ratio > 0.956) & (ratio < 1.046)).double().mean() > 0.97
    model, _ = load_model(str(folder), device="cpu")
    clipped = ClippedStore(store, model, 0.1).rows("train", 0, 1)
    kept_TF = unpack(clipped.mask_TP, 136)
    size_TF = hand.x1(rows.x_TD).abs()
    smallest = size_TF.where(kept_TF, torch.inf).amin(1)
    largest = size_TF.where(~kept_TF & fired_TF, 0).amax(1)
    assert (smallest > largest / 1.1).double().mean() > 0.95


def test_a_neuron_whose_norm_weight_is_zero_never_counts_as_large(family_folder):
    model, _ = load_model(str(family_folder("bitnet")), device="cpu")
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.mlp.ffn_sub_norm.weight[3] = 0
        layer.mlp.ffn_sub_norm.weight[4] = -2
    gain_F = family_of(model.config, "m").x1_gains(layer)
    column = layer.mlp.down_proj.weight[:, 4].double().norm().item()
    assert gain_F[3] == 0
    assert gain_F[4].item() == pytest.approx(2 * column)


def test_baselines_read_the_rounded_gate(family_folder):
    folder = family_folder("bitnet-online")
    model, _ = load_model(str(folder), device="cpu")
    hand = ByHand(folder, 1, online=True)
    weight_FD, _ = gate_of(model, 1)
    torch.testing.assert_close(weight_FD.double(), hand.gate * hand.norm, rtol=1e-5, atol=1e-6)


def changed(folder, copy, change):
    shutil.copytree(folder, copy)
    raw = json.loads((copy / "config.json").read_text())
    change(raw)
    (copy / "config.json").write_text(json.dumps(raw))
    return copy


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"quantization_mode": "offline"}, r"quantized \(bitnet, offline\).*ends in -bf16"),
        ({"linear_class": "bitlinear"}, r"quantized \(bitnet, online\).*ends in -bf16"),
        ({"use_rms_norm": True}, r"quantized \(bitnet, online\)"),
        ({"modules_to_not_convert": ["model.layers.0"]}, r"quantized \(bitnet, online\)"),
        ({"quant_method": "gptq"}, r"quantized \(gptq\), .*give the model they were made from"),
        ({"surprise": 1}, r"quantized \(bitnet, online\)"),
    ],
)
def test_only_master_weights_rounded_online_are_read(fields, match, family_folder, tmp_path):
    def change(raw):
        raw["quantization_config"] |= fields

    copy = changed(family_folder("bitnet-online"), tmp_path / "m", change)
    with pytest.raises(InputError, match=match):
        load_model(str(copy), device="cpu")


def test_a_saved_copy_and_packed_weights(family_folder, tmp_path):
    """transformers writes every field of the quantization; packed weights are 8-bit numbers."""
    folder = family_folder("bitnet-online")
    model, _ = load_model(str(folder), device="cpu")
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    model.save_pretrained(copy)
    assert "use_rms_norm" in (copy / "config.json").read_text()
    load_model(str(copy), device="cpu")
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = torch.zeros(34, 64, dtype=torch.uint8)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"tensor {name} is uint8"):
        load_model(str(copy), device="cpu")


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_other_families_are_not_rounded(kind, family_folder, tmp_path):
    online = json.loads((family_folder("bitnet-online") / "config.json").read_text())

    def change(raw):
        raw["quantization_config"] = online["quantization_config"]

    copy = changed(family_folder(kind), tmp_path / "m", change)
    with pytest.raises(InputError, match="its weights are quantized"):
        load_model(str(copy), device="cpu")


def test_kernels_refuse_a_linear_that_rounds(family_folder):
    model, _ = load_model(str(family_folder("bitnet-online")), device="cpu")
    with pytest.raises(InputError, match=r"layer 0 has mlp\.gate_proj as a AutoBitLinear"):
        sparsify_model(model, None, "exact")


def test_a_machine_that_cannot_compile_says_so(monkeypatch):
    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: no g++\nmore lines")

    monkeypatch.setattr("transformers.integrations.bitnet.ActQuant.apply", fail)
    with pytest.raises(InputError, match=r"torch\.compile.*no g\+\+.*install a C\+\+ compiler"):
        check_compiles(torch.device("cpu"))


@pytest.mark.slow
def test_compiled_rounding_is_the_same(family_folder):
    model, _ = load_model(str(family_folder("bitnet-online")), device="cpu")
    ids = torch.randint(3, 512, (2, 30))
    with torch.inference_mode():
        eager = model(ids).logits
        with torch.compiler.set_stance("default"):
            check_compiles(torch.device("cpu"))
            torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=1e-4)
