"""Small sound inputs, which the tests copy and break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.collect.store.store import Manifest
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.predictor import Predictor
from sparsecast.sparsify.train_tokenizer import train_tokenizer

settings.register_profile("many", max_examples=5_000)

HIDDEN, WIDTH, TOKENS = 16, 24, 8


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escape lone surrogates in what a test wrote or failed with: pytest-xdist cannot send them."""
    report = yield
    report.sections = [(name, _sendable(text)) for name, text in report.sections]
    if report.failed:
        report.longrepr = _sendable(str(report.longrepr))
    return report


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="session")
def copy_of():
    """Copy a sound folder: (folder, where to) to the copy."""

    def copy(folder: Path, to: Path) -> Path:
        return Path(shutil.copytree(folder, to))

    return copy


@pytest.fixture(scope="session")
def sound_store(tmp_path_factory, write_store) -> Path:
    """One layer of 24 neurons, and a shard of 8 tokens per split."""
    manifest = Manifest(
        model="m",
        fingerprint="0" * 16,
        model_type="llama",
        config={},
        dtype="float32",
        threads=1,
        tokenizer="none",
        convention="residual-before-ffn-norm",
        activation="relu",
        activation_threshold=0.0,
        corpus="none",
        options={},
        layers=[0],
        hidden_size=HIDDEN,
        ffn_width=WIDTH,
        ffn_matrices=3,
        x_dtype="float16",
        energy=False,
    )
    made = torch.Generator().manual_seed(0)

    def shard() -> list[tuple[torch.Tensor, torch.Tensor]]:
        x1_TF = torch.randn(TOKENS, WIDTH, generator=made).relu()
        return [(torch.randn(TOKENS, HIDDEN, generator=made).half(), x1_TF)]

    folder = tmp_path_factory.mktemp("sound") / "acts"
    splits = ("train", "calibration", "held-out")
    write_store(folder, manifest, {split: [shard()] for split in splits})
    return folder


@pytest.fixture
def make_predictors(manifest_of) -> Callable[[Path], Path]:
    """Write a folder of two layers, of rank 4 in f16."""

    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        layers = [Predictor(torch.randn(4, 8), torch.randn(16, 4)) for _ in range(2)]
        PredictorSet(layers, 0.5, manifest_of(layers)).save(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def sound_model(tmp_path_factory) -> Path:
    """A llama of one layer with ReLU, and a tokenizer of 300 pieces."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    folder.mkdir()
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], 300, folder)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        hidden_act="relu",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder
