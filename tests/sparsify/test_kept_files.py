"""Which files of the source go along: every one of the tokenizer, unchanged, and no weights."""

from __future__ import annotations

import json

import pytest

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.sparsify.run import sparsify

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
PUBLISHED = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": [2, 5]}
"""transformers reads this and refuses to write it: a temperature without sampling."""
KEPT = {
    "generation_config.json": json.dumps(PUBLISHED, indent=3),
    "special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}),
    "added_tokens.json": json.dumps({"<|im_start|>": 513}),
    "chat_template.jinja": TEMPLATE,
    "tool_chat_template.jinja": TEMPLATE + "{# tools #}",
    "additional_chat_templates/tool_use.jinja": TEMPLATE + "!",
    "additional_chat_templates/rag.jinja": TEMPLATE + "?",
    "vocab.json": '{"a": 0,\n "b": 1}',
    "merges.txt": "#version: 0.2\na b\n",
    "vocab.txt": "a\nb\n",
    "tekken.json": "{}",
    "LICENSE": "Apache License 2.0",
    "NOTICE.txt": "of whom it is",
    "USE_POLICY.md": "what it may do",
}
LEFT = (
    "README.md",
    "tokenizer.py",
    "tokenization_x.py",
    "vocab.bin",
    "modeling_x.py",
    "pytorch_model.bin",
    "training_args.bin",
    "tokenizer.safetensors",
    "preprocessor_config.json",
    ".gitattributes",
)
WRITTEN = {"README.md", "config.json", "model.safetensors", "run.json", "sparsify.json"}


@pytest.fixture
def source(dense):
    folder = dense(vocab_size=520)
    (folder / "additional_chat_templates").mkdir()
    for name, text in KEPT.items():
        (folder / name).write_text(text)
    for name in LEFT:
        (folder / name).write_text("of the source")
    return folder


def test_each_file_is_byte_for_byte_the_source_s(source, options):
    out = sparsify(options(model=str(source)))

    kept = {*KEPT, "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    there = {path.name for path in out.iterdir() if path.is_file()} | {
        f"additional_chat_templates/{path.name}"
        for path in (out / "additional_chat_templates").iterdir()
    }
    assert there == kept | WRITTEN
    for name in kept:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert "of the source" not in (out / "README.md").read_text()
    tokenizer = load_tokenizer(Checkpoint(str(out)))
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[user]x"
    assert tokenizer.get_chat_template("rag") == TEMPLATE + "?"


def test_a_source_without_a_generation_config_gets_its_config_s(dense, options):
    folder = dense()
    (folder / "generation_config.json").unlink()

    out = sparsify(options(model=str(folder)))

    made = json.loads((out / "generation_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert made["eos_token_id"] == config["eos_token_id"]
