"""The tokenizer in a GGUF for llama.cpp: which rules, which keys, and what has to be allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.other_tokens import model_ids
from sparsecast.export.run import export
from sparsecast.export.to_gguf.tokens import llama_cpp_encode, matching_rules

TEXTS = [
    "def f(x):\n    return x\n",
    "It's 1234567 and 89, isn't it?",
    "IT'S a  b;\n\n  cafe\u0301 \u4f60\u597d\U0001f600\t \n",
    "   ",
    "",
]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's, as its tokenizer.json spells it."""
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
KINDS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "smaug-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT4), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT4.replace("{1,3}", "")), "isolated"), BYTES]
    ),
}


@pytest.fixture
def model(byte_copy) -> Path:
    """A byte-level model with plain ReLU."""
    path = byte_copy / "config.json"
    config = json.loads(path.read_text()) | {"hidden_act": "relu", "hidden_act_param": None}
    path.write_text(json.dumps(config))
    return byte_copy


def change(model: Path, **parts: object) -> Tokenizer:
    path = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(path))
    return tokenizer


def ignoring_merges(model: Path) -> None:
    path = model / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["ignore_merges"] = True
    path.write_text(json.dumps(spec))


def exported(model: Path, **options: object) -> dict[str, object]:
    out = model.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    file = export(ExportConfig(model=str(model), format="gguf", out=out, **options))
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def test_each_kind_gets_its_name_and_the_same_tokens(model):
    for name, step in KINDS.items():
        change(model, pre_tokenizer=step)
        keys = exported(model)
        assert keys["tokenizer.ggml.pre"] == name
        assert keys["tokenizer.ggml.model"] == "gpt2"
        assert "sparsecast.other_tokens" not in keys
        spec = json.loads((model / "tokenizer.json").read_text())
        ours = llama_cpp_encode(spec, matching_rules(spec)[0])
        theirs = model_ids(load_tokenizer(Checkpoint(str(model))))
        assert [ours(text) for text in TEXTS] == [theirs(text) for text in TEXTS]
    change(model, pre_tokenizer=KINDS["smaug-bpe"])
    ignoring_merges(model)
    assert exported(model)["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"normalizer": normalizers.NFC()}, r"normalizes text \(NFC\); llama.cpp does not"),
        (
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
            r'splits text by \{"type": "ByteLevel", "add_prefix_space": true',
        ),
        (
            {
                "pre_tokenizer": pre_tokenizers.Sequence(
                    [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                )
            },
            'splits text by {"type": "Punctuation"',
        ),
    ],
)
def test_other_kinds_need_consent_and_are_counted(model, parts, reason):
    change(model, **parts)
    with pytest.raises(InputError, match=reason + r".*of 3 documents.*--allow-other-tokens"):
        exported(model)
    keys = exported(model, allow_other_tokens=True)
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    count = json.loads(keys["sparsecast.other_tokens"])
    assert (count["documents"] > 0) == ("normalizer" not in parts or count["tokens"] > 0)
    card = (model.parent / "out" / "README.md").read_text()
    assert "llama.cpp makes other tokens" in card


def test_words_taken_whole(model):
    ignoring_merges(model)
    with pytest.raises(InputError, match=r"a word whole where it is a token \(ignore_merges\)"):
        exported(model)


def test_bos_and_the_chat_template(model, zoo):
    keys = exported(model)
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert "tokenizer.chat_template" not in keys
    end = "<|endoftext|>"
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    one = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, tokenizer.token_to_id(end))])
    change(model, post_processor=one)
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}
    path.write_text(json.dumps(config))
    keys = exported(model)
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


def test_sentencepiece(zoo, tmp_path):
    model = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    keys = exported(model)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.pre"] == "default"
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert len(keys["tokenizer.ggml.scores"]) == len(keys["tokenizer.ggml.tokens"]) == 512
