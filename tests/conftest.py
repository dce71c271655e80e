"""A small FATReLU llama with random weights, a corpus of real files, and what was recorded."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.sparsify.tokenizer import train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 60 standard library sources as .txt files."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(STDLIB.glob("*.py"))[10:70]:
        (folder / f"{path.stem}.txt").write_text(path.read_text(errors="replace")[:20_000])
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, corpus) -> Path:
    """A saved model: 3 layers, hidden 64, FFN 1280, 4 query and 2 KV heads, 512 pieces."""
    folder = tmp_path_factory.mktemp("model")
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    tokenizer = train_tokenizer(texts, 512, folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=1280,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        rope_theta=50_000.0,
        initializer_range=0.1,
        hidden_act="fatrelu",
        hidden_act_param=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # a norm of ones would hide a missing one
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def acts(tmp_path_factory, model_folder, corpus):
    """6,000 tokens recorded from `model_folder` over `corpus`."""
    out = tmp_path_factory.mktemp("acts") / "acts"
    cfg = CollectConfig(
        model=str(model_folder), corpus=str(corpus), out=out, tokens=6_000, seq_len=256
    )
    return collect(cfg)
