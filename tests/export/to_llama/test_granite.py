"""Other models with scales: Granite as transformers has it, and those of MiniCPM's code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from native_minicpm import minicpm_logits, save_minicpm
from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import build_model, load_model
from sparsecast.export.to_llama.config import ConvertConfig
from sparsecast.export.to_llama.run import convert

GRANITE = {
    "hidden_size": 64,
    "intermediate_size": 1280,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.4,
}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"hidden_act": "silu", "tie_word_embeddings": True},
        {"hidden_act": "relu", "attention_bias": True, "mlp_bias": True},
    ],
)
def test_a_granite_is_folded_attention_and_biases_too(model_folder, tmp_path, change, capfd):
    folder = tmp_path / "granite"
    own = GraniteForCausalLM(GraniteConfig(**GRANITE, **change)).eval()
    for name, weight in own.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(weight, -0.3, 0.3)
    own.save_pretrained(folder)
    for path in model_folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())

    out = convert(ConvertConfig(model=str(folder), to="llama", out=tmp_path / "llama"))

    llama = build_model(Checkpoint(str(out)), torch.float32).eval()
    ids_NS = torch.randint(3, 512, (2, 50))
    with torch.inference_mode():
        want, got = own(ids_NS).logits, llama(ids_NS).logits
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert json.loads((out / "convert.json").read_text())["proof"]["apart"] < 1e-7
    told = " ".join(capfd.readouterr().err.split())
    assert ("makes it sparse" in told) == (change["hidden_act"] == "silu")
    # Its tokenizer is not MiniCPM's: nothing is added.
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    for path in model_folder.glob("tokenizer*"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_sparsing_law_has_no_model_type(model_folder, tmp_path):
    """And no tie_word_embeddings: MiniCPM's class ties."""
    fields = {"model_type": ..., "hidden_act": "relu", "hidden_act_param": ..., "head_dim": None}
    wanted = save_minicpm(tmp_path / "m", model_folder, **fields)

    out = convert(ConvertConfig(model=str(tmp_path / "m"), to="llama", out=tmp_path / "llama"))

    model, tokenizer = load_model(str(out), device="cpu", dtype="float32")
    ids_S = torch.randint(3, 512, (50,))
    with torch.inference_mode():
        got_SV = model(ids_S[None]).logits[0]
    want_SV = minicpm_logits(wanted, ids_S, threshold=0.0)
    assert (got_SV - want_SV).abs().max() < 2e-6 * want_SV.abs().max()
    assert json.loads(Path(out / "config.json").read_text())["hidden_act"] == "relu"
    assert tokenizer.chat_template
