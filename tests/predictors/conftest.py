"""A synthetic activation store with labels that predictors of rank 32 can learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.collect.store.store import ActivationStore, Manifest
from sparsecast.core.text.splits import SPLITS
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.train import train

HIDDEN, FFN, LAYERS = 64, 200, 2
TOKENS = {"train": 6_000, "calibration": 1_000, "held-out": 1_000}


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory, write_store) -> ActivationStore:
    """Two layers of hidden size 64 and 200 neurons, about 88 % inactive, with a gate of rank 12.

    Inputs have a constant direction, like residual streams, and norms that differ tenfold.
    """
    folder = tmp_path_factory.mktemp("synthetic") / "acts"
    generator = torch.Generator().manual_seed(7)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    gates = [randn(FFN, 12) @ randn(12, HIDDEN) / 12**0.5 / HIDDEN**0.5 for _ in range(LAYERS)]
    mean_D = 2 * randn(HIDDEN)
    manifest = Manifest(
        model="synthetic",
        fingerprint="0" * 16,
        model_type="llama",
        dtype="float32",
        tokenizer="none",
        convention="residual-before-ffn-norm",
        activation="relu",
        activation_threshold=0.0,
        corpus="none",
        options={},
        config={},
        threads=1,
        layers=list(range(LAYERS)),
        hidden_size=HIDDEN,
        ffn_width=FFN,
        ffn_matrices=3,
        x_dtype="float16",
        energy=False,
    )
    recorded = {}
    for split in SPLITS:
        recorded[split] = []
        for _ in range(2):  # two shards a split
            n = TOKENS[split] // 2
            layers = []
            for gate_FD in gates:
                noise_TD = randn(n, HIDDEN)
                x1_TF = (noise_TD @ gate_FD.T - 1.2).relu()
                norm_T1 = 0.3 + 3 * torch.rand(n, 1, generator=generator)
                layers.append((norm_T1 * (mean_D + noise_TD), x1_TF))
            recorded[split].append(layers)
    return write_store(folder, manifest, recorded)


@pytest.fixture
def flipped():
    """Copy a store with one bit flipped: call with (store's folder, copy, shard, tensor)."""

    def flip(source: Path, folder: Path, shard: str, name: str) -> Path:
        shutil.copytree(source, folder)
        raw = bytearray((folder / shard).read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        first, last = json.loads(raw[8:start])[name]["data_offsets"]
        raw[start + (first + last) // 2] ^= 1
        (folder / shard).write_bytes(raw)
        return folder

    return flip


@pytest.fixture(scope="session")
def recipe(synthetic, tmp_path_factory) -> TrainConfig:
    return TrainConfig(
        activations=synthetic.folder,
        out=tmp_path_factory.mktemp("trained") / "pred",
        rank=32,
        predictor_dtype="f16",
        target_recall=0.95,
        epochs=3,
        batch_size=128,
        device="cpu",
    )


@pytest.fixture(scope="session")
def trained(recipe):
    """Predictors of the synthetic store, calibrated to a recall of 0.95."""
    return train(recipe)


@pytest.fixture(scope="session")
def with_energies(model_folder, corpus, tmp_path_factory):
    """A store of a small model's activations and energies."""
    return collect(
        CollectConfig(
            model=str(model_folder),
            corpus=str(corpus),
            out=tmp_path_factory.mktemp("energies") / "acts",
            tokens=3_000,
            seq_len=128,
            energy=True,
            device="cpu",
        )
    )
