"""Sparse checkpoints in plain transformers, against FFNs written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from dense_families import KINDS, write_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

import sparsecast.integrations.transformers  # noqa: F401  what is tested
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.kernels.in_models.sparsify import sparsify_model

IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(5))
THRESHOLD = 0.07
PLACES = {
    "opt": ("model.decoder.layers.{}.", None, "fc1", "fc2"),
    "falcon": ("transformer.h.{}.", None, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}
GATED = ("model.layers.{}.", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def sparse_folder(tmp_path, model_folder):
    """A random model of a kind with a sparse activation in its config: (kind, name) to a folder."""

    def make(kind: str, act: str, **fields):
        folder = write_model(tmp_path / f"{kind}-{act}", model_folder, kind)
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {KINDS[kind].act_key: act} | fields
        if act == "fatrelu":
            config["hidden_act_param"] = THRESHOLD
        path.write_text(json.dumps(config))
        return folder

    return make


def x1_of(act: str, gate, up):
    if act == "relu":
        return gate.clamp(min=0) * up
    if act == "relu2":
        return gate.clamp(min=0) ** 2 * up
    if act == "drelu":
        return gate.clamp(min=0) * up.clamp(min=0)
    return gate * (gate >= THRESHOLD) * up


def by_hand(folder, kind: str, act: str) -> torch.Tensor:
    """Logits of the model with ReLU whose FFNs are replaced by products of the file's tensors."""
    config = json.loads((folder / "config.json").read_text())
    config[KINDS[kind].act_key] = "relu"
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    weights = {name: w.double() for name, w in load_file(folder / "model.safetensors").items()}
    layers, gate, up, down = PLACES.get(kind, GATED)

    class Ffn(nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            self.prefix = prefix

        def project(self, x, name):
            y = x @ weights[f"{self.prefix}{name}.weight"].T
            return y + weights.get(f"{self.prefix}{name}.bias", 0)

        def forward(self, x):
            first = self.project(x, up if gate is None else gate)
            ones = torch.ones_like(first)
            x1 = x1_of(act, first, ones if gate is None else self.project(x, up))
            return self.project(x1, down)

    for number in range(config["num_hidden_layers"]):
        prefix = layers.format(number)
        layer = model.get_submodule(prefix.rstrip("."))
        if kind == "opt":
            layer.fc1, layer.activation_fn, layer.fc2 = Ffn(prefix), nn.Identity(), nn.Identity()
        else:
            layer.mlp = Ffn(prefix)
    with torch.no_grad():
        return model.eval()(IDS).logits


CASES = [(kind, "fatrelu") for kind in KINDS]
CASES += [("llama", "relu"), ("llama", "relu2"), ("llama", "drelu"), ("mistral", "drelu")]
CASES += [("gemma2", "drelu"), ("llama-biased", "drelu")]


@pytest.mark.parametrize(("kind", "act"), CASES, ids=lambda name: name)
def test_a_checkpoint_computes_what_its_config_says(sparse_folder, kind, act):
    folder = sparse_folder(kind, act)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(IDS).logits
    wanted = by_hand(folder, kind, act)
    assert (logits - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    if act != "relu":
        other = by_hand(folder, kind, "relu")
        assert (other - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_the_threshold_itself_stays(sparse_folder):
    folder = sparse_folder("llama", "fatrelu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    act = model.model.layers[0].mlp.act_fn
    at = torch.tensor(THRESHOLD)
    below = at.nextafter(torch.tensor(0.0))
    assert act(torch.stack([at, below])).tolist() == [at.item(), 0.0]


def test_the_class_of_the_family_works_like_auto(sparse_folder):
    folder = sparse_folder("llama", "drelu")
    auto = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(auto(IDS).logits, own(IDS).logits)


def test_our_own_loader_gives_the_same(sparse_folder):
    for act in ("fatrelu", "drelu"):
        folder = sparse_folder("llama", act)
        model, _ = load_model(str(folder), device="cpu", dtype="float32")
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_a_saved_copy_is_read_the_same(sparse_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_folder("llama", "fatrelu"))
    model.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=model.dtype)
    assert again.model.layers[1].mlp.act_fn.threshold == THRESHOLD
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_sparsellama_is_a_llama_and_its_code_is_not_run(sparse_folder):
    folder = sparse_folder(
        "llama",
        "fatrelu",
        model_type="sparsellama",
        architectures=["SparseLlamaForCausalLM"],
        auto_map={"AutoConfig": "configuration_sparsellama.SparseLlamaConfig"},
    )
    (folder / "configuration_sparsellama.py").write_text("raise SystemExit('ran')")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    assert (model.config.model_type, model.config.hidden_act_param) == ("llama", THRESHOLD)
    ours, _ = load_model(str(folder), device="cpu", dtype="float32")
    assert torch.equal(model(IDS).logits, ours(IDS).logits)


def llama(**fields) -> LlamaForCausalLM:
    sizes = {**KINDS["llama"].fields, **fields}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize("param", [None, "0.1", -0.1, True, float("nan"), 1e39])
def test_a_config_without_a_threshold_is_refused_where_it_would_count(param):
    model = llama(hidden_act="fatrelu", hidden_act_param=param)
    with pytest.raises(RuntimeError, match="no threshold: hidden_act_param in the config"):
        model(IDS)


def test_what_replaces_up_keeps_the_relu():
    """Quantization puts its own layers where nn.Linear was."""
    model = llama(hidden_act="drelu")
    before = model(IDS).logits
    for layer in model.model.layers:
        up = nn.Linear(16, 32, bias=False)
        up.weight = layer.mlp.up_proj.weight
        layer.mlp.up_proj = up
    assert torch.equal(model(IDS).logits, before)


def test_other_models_are_built_as_before():
    model = llama(hidden_act="silu")
    assert not any(module._forward_hooks for module in model.modules())


WITHOUT = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model(torch.tensor([[1, 2]]))
    except (KeyError, RuntimeError) as error:
        print(type(error).__name__, error)
    else:
        print("ran", *{type(m).__name__ for m in model.modules() if "ReLU" in type(m).__name__})
"""


def test_without_the_import_transformers_does_what_the_card_says(sparse_folder):
    names = ("fatrelu", "drelu", "relu", "relu2")
    folders = [str(sparse_folder("llama", name)) for name in names]
    command = [sys.executable, "-c", WITHOUT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "KeyError 'fatrelu'",
        "KeyError 'drelu'",
        "ran ReLU",
        "ran ReLUSquaredActivation",
    ]


@pytest.mark.parametrize("act", ["fatrelu", "drelu", "relu2"])
def test_the_pipeline_runs_a_model_with_sparse_ffns(sparse_folder, act):
    """Greedy text of the exact path against the dense model's."""
    folder = sparse_folder("llama", act)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _, tokenizer = load_model(str(folder), device="cpu", dtype="float32")
    wanted = pipeline("text-generation", model=dense, tokenizer=tokenizer)
    sparse = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = pipeline(
        "text-generation", model=sparsify_model(sparse, policy="exact"), tokenizer=tokenizer
    )
    for prompt in ("import os", "def f(x):"):
        options = {"max_new_tokens": 24, "do_sample": False}
        assert made(prompt, **options) == wanted(prompt, **options)


def test_the_pipeline_opens_the_shipped_model_by_its_folder():
    model, tokenizer = load_model("tiny-prosparse", device="cpu", dtype="float32")
    options = {"tokenizer": tokenizer, "dtype": torch.float32}
    made = pipeline("text-generation", model=str(TINY_PROSPARSE), **options)
    wanted = pipeline("text-generation", model=model, **options)
    prompt, generation = "import os\nimport", {"max_new_tokens": 16, "do_sample": False}
    assert made(prompt, **generation) == wanted(prompt, **generation)


def test_the_code_on_the_card_runs():
    """Of the shipped model; sparsify writes the same (tests/sparsify/test_card.py)."""
    text = (TINY_PROSPARSE / "README.md").read_text()
    codes = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    assert len(codes) == 2
    found = []
    for code in codes:
        names: dict[str, Any] = {}
        exec(code.replace("path/to/this/folder", str(TINY_PROSPARSE)), names)
        ids = names["tokenizer"]("import os", return_tensors="pt").input_ids
        found.append(names["model"].float()(ids).logits)
    assert torch.equal(*found)


def test_the_shipped_model_gets_the_one_bos_that_it_needs_from_plain_transformers():
    tokenizer = AutoTokenizer.from_pretrained(TINY_PROSPARSE)
    model, ours = load_model("tiny-prosparse", device="cpu")
    ids = tokenizer("import os\nimport", return_tensors="pt")["input_ids"]
    assert ids[0].eq(ours.bos_token_id).nonzero().tolist() == [[0]]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    without = tokenizer.decode(model.generate(ids[:, 1:], max_new_tokens=8, do_sample=False)[0])
    assert "import sys" in text, text
    assert "import sys" not in without
