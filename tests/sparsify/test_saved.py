"""What is written is what was measured: the family's own field, the tokenizer, the weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule
from sparsecast.core.models.loading import load_model, load_tokenizer
from sparsecast.core.run_record import RUN
from sparsecast.core.tokenizers import copies
from sparsecast.sparsify import run, save
from sparsecast.sparsify.run import sparsify

CHAT = [{"role": "user", "content": "def f"}]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def facts_of(folder):
    return json.loads((folder / "sparsify.json").read_text())


@pytest.mark.parametrize(
    ("family", "act", "key"),
    [
        ("llama", "silu", "hidden_act"),
        ("opt", "relu", "activation_function"),
        ("opt", "gelu", "activation_function"),
        ("falcon", "gelu", "activation"),
    ],
)
def test_the_activation_is_written_where_the_family_reads_it(dense, options, family, act, key):
    out = sparsify(options(model=str(dense(family, act)), shift_tolerance=1.0))

    config, facts = json.loads((out / "config.json").read_text()), facts_of(out)
    assert (config[key], config["hidden_act_param"]) == ("fatrelu", facts["threshold"])
    assert facts["threshold"] > 0
    assert [name for name in config if "act" in name and config[name] == "fatrelu"] == [key]
    rule = activation_rule(Checkpoint(str(out)).config, "out")
    assert (rule.name, rule.threshold) == ("fatrelu", facts["threshold"])


def test_plain_transformers_refuses_what_it_would_compute_wrongly(dense, options, monkeypatch):
    out = sparsify(options(model=str(dense("opt", "relu")), shift_tolerance=1.0))
    monkeypatch.delitem(ACT2FN, "fatrelu")  # which sparsecast has taught it

    with pytest.raises(KeyError, match="fatrelu"):
        AutoModelForCausalLM.from_pretrained(out)

    assert "KeyError" in (out / "README.md").read_text()


def test_a_threshold_of_zero_is_plain_relu_to_everybody(dense, options, monkeypatch):
    monkeypatch.setattr(run, "choose_activation", lambda _plan, setup, _trained: (setup.rule, []))

    out = sparsify(options(model=str(dense("llama", "fatrelu", hidden_act_param=0.1))))

    config = json.loads((out / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert "hidden_act_param" not in config
    assert "no FATReLU threshold" in (out / "README.md").read_text()


def test_relu_on_gate_and_up_stays_on_both(dense, options):
    """Bamboo: loaded as a Mistral with dReLU."""
    source = dense("mistral", "relu")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "bamboo", "architectures": ["BambooForCausalLM"], "hidden_act": "relu"}
    (source / "config.json").write_text(json.dumps(config))

    out = sparsify(options(model=str(source), baselines=True))

    model, _ = load_model(str(out), device="cpu")
    held_out = facts_of(out)["held_out"]
    trained = ["dReLU original", "fixed L1", "ProSparse before the shift"]
    assert list(held_out) == [*trained, "as saved"]
    assert all(row["sparsity"] > 0.6 for row in held_out.values())  # 3/4 of random products
    assert activation_rule(model.config, "out").name == "drelu"


def test_baselines_keep_the_activation_the_model_came_with(dense, options):
    out = sparsify(options(model=str(dense("opt", "gelu")), baselines=True))

    held_out = facts_of(out)["held_out"]
    assert list(held_out)[:3] == ["GELU original", "plain ReLU", "fixed L1"]
    assert held_out["GELU original"]["sparsity"] < 0.01
    assert "against GELU" in (out / "README.md").read_text()


def _sentencepiece(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    added = {"[PAD]": 512, "<|im_start|>": 513, "<|im_end|>": 514}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    special |= {"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def _byte_level(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    trained = ByteLevelBPETokenizer()
    texts = ["def read(path): return path"] * 9
    trained.train_from_iterator(texts, vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"])
    trained.save_model(str(folder))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "GPT2Tokenizer", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _templates(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE + "!")


@pytest.mark.parametrize("change", [_sentencepiece, _byte_level, _templates])
def test_everything_of_the_tokenizer_goes_along(dense, options, change):
    source = dense(vocab_size=520)
    change(source)

    out = sparsify(options(model=str(source)))

    before, after = (load_tokenizer(Checkpoint(str(folder))) for folder in (source, out))
    assert save.tokenizer_differences(before, after, ["def f <|im_start|>\n\tx", "é ☃"]) is None
    assert len(before) > 3
    assert len({path.stat().st_mode for path in out.glob("*.*") if path.is_file()}) == 1
    assert before.chat_template == after.chat_template
    if change is _templates:
        assert after.apply_chat_template(CHAT, tokenize=False) == "[user]def f"
        assert after.get_chat_template("tool_use") == TEMPLATE + "!"


def test_a_published_generation_config_is_kept_though_transformers_would_not_write_it(
    dense, options
):
    source = dense()
    published = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": [2, 5]}
    (source / "generation_config.json").write_text(json.dumps(published))

    out = sparsify(options(model=str(source)))

    assert json.loads((out / "generation_config.json").read_text()) == published


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "cannot be loaded again"),
        (lambda f: (f / "chat_template.jinja").write_text("x"), "another chat template"),
        (lambda f: _edit(f, hidden_act="silu"), "cannot be loaded again .*hidden_act is 'silu'"),
        (lambda f: _edit(f, hidden_act_param=3.0), "not the one that was measured"),
        (lambda f: _halve(f), "not the one that was measured"),
    ],
)
def test_a_model_that_does_not_load_as_it_was_measured_never_appears(
    dense, options, tmp_path, monkeypatch, spoil, match
):
    write = run.write_model
    monkeypatch.setattr(run, "write_model", lambda *args: (write(*args), spoil(args[-1])))
    cfg = options(model=str(dense()), shift_tolerance=1.0)

    with pytest.raises(RuntimeError, match=match):
        sparsify(cfg)

    assert not cfg.out.exists()
    assert not (tmp_path / ".out.part").exists()
    assert list((tmp_path / ".out.work").glob("*.pt"))  # the training is not lost


def _edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _halve(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 0.5
    save_file(tensors, path, {"format": "pt"})


def test_a_tokenizer_that_cannot_be_copied_is_refused_before_training(dense, options, monkeypatch):
    source = dense()
    (source / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(copies, "FILES", ("tokenizer*",))

    with pytest.raises(InputError, match="copy of this tokenizer's files gives another chat"):
        sparsify(options(model=str(source)))


def test_rounding_leaves_what_no_file_holds(dense):
    model, _ = load_model(str(dense(act="relu")), device="cpu")
    before = model.model.rotary_emb.inv_freq.clone()
    model.lm_head.weight.data += 1e-5

    run._round_weights(model, torch.float16)

    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    weight = model.lm_head.weight
    assert torch.equal(weight, weight.half().float())


def test_no_path_of_this_machine_is_published(dense, options, tmp_path):
    out = sparsify(options(model=str(dense())))

    shutil.rmtree(tmp_path / "llama-silu")
    for path in (found for found in out.rglob("*") if found.is_file() and found.name != RUN):
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert b"/short" not in path.read_bytes(), path
