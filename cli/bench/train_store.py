"""The random activation store that `sparsecast bench train` trains on."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsecast.collect.store.filler import Filler
from sparsecast.collect.store.store import ActivationStore, Manifest, seal
from sparsecast.collect.store.units import Unit
from sparsecast.collect.store.writer import Writer, record_unit, to_folder
from sparsecast.core.text.splits import SPLITS
from sparsecast.core.text.tokens import TokenBatch

ACTIVE = 0.12
"""Share of active entries."""


def random_store(folder: Path, d: int, f: int, layers: int, tokens: int) -> ActivationStore:
    """Write a store of random inputs and masks, as `collect` does.

    It has `tokens` training tokens, and one token each in calibration and held-out. Memory: one
    layer of a shard.
    """
    manifest = Manifest(
        model="random", fingerprint="0" * 16, model_type="llama", config={}, threads=1,
        dtype="bfloat16", tokenizer="none", convention="none", activation="relu",
        activation_threshold=0.0, corpus="random", options={}, layers=list(range(layers)),
        hidden_size=d, ffn_width=f, ffn_matrices=3, x_dtype="bfloat16", energy=False,
    )  # fmt: skip
    shape = manifest.shape
    filler = Filler(shape)
    counts = {"train": tokens, "calibration": 1, "held-out": 1}
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, d, generator=generator).bfloat16()
    x1_TF = (torch.rand(tokens, f, generator=generator) < ACTIVE).bfloat16()

    def forward(batch: TokenBatch) -> None:
        for layer in range(layers):
            filler(layer, x_TD[: batch.tokens], x1_TF[: batch.tokens])

    shards = []
    with Writer(shape, shape.nbytes(tokens), to_folder(folder)) as writer:
        for split in SPLITS:
            ids = torch.zeros(1, counts[split], dtype=torch.int64)
            unit = Unit(split, 0, [TokenBatch(split, ids, torch.ones_like(ids).bool())])
            record_unit(filler, writer, unit, forward)
            shards.append(unit.info)
    seal(folder, manifest, shards)
    return ActivationStore(folder)
