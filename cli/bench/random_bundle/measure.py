"""Measure from a random bundle's own file what its gates and predictors do."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.cli.bench.random_bundle.vocabulary import FIRST_WORD
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.read.reader import GGUFFile
from sparsecast.predictors.metrics import Counts, count


class MeasuredPoint(NamedTuple):
    """Plain means over the layers that were measured, as `sparsecast report` defines them."""

    recall: float
    predicted_sparsity: float
    true_sparsity: float


class _Layers(Emulator):
    """The engine's predictor and gate of one layer."""

    @torch.no_grad()
    def counts(self, layer: int, z_TD: Tensor) -> Counts:
        """Count what fires and what is predicted at a residual before the FFN norm.

        A neuron fires where its gate is above 0; up is never exactly 0.
        """
        block = f"blk.{layer}"
        predicted_TF = self.predictor_logits(z_TD, layer) >= self.header.threshold
        x_TD = self._norm(z_TD, f"{block}.ffn_norm")
        return count(predicted_TF, self._product(x_TD, f"{block}.ffn_gate.weight") > 0)


def measured_point(file: Path, tokens: int = 64, layers: int = 4) -> MeasuredPoint:
    """Evaluate a bundle of `write_random_bundle` at random tokens as the engine would.

    In every layer the residual is taken to be the embedding. Attention and FFNs move it by 1 % at
    most (weights.py); the tests compare this with whole forward passes.

    Memory: the pages of the file that it reads, and one gate in float32, in float64 where it is
    quantized: 0.9 GB for a 7B. It takes seconds.

    Args:
        file: The GGUF file.
        layers: How many to measure, the first, the last and others between at equal distances.
    """
    emulator = _Layers(GGUFFile(file))
    header = emulator.header
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(FIRST_WORD, header.vocab, (tokens,), generator=generator)
    rows = (emulator.file.rows("token_embd.weight", i, 1) for i in ids_T.tolist())
    z_TD = torch.cat(list(rows)).float()
    chosen = torch.linspace(0, header.layers - 1, min(layers, header.layers)).round().int()
    counts = [emulator.counts(layer, z_TD) for layer in chosen.tolist()]
    return MeasuredPoint(
        fmean(c.recall for c in counts),
        fmean(c.predicted_sparsity for c in counts),
        fmean(c.true_sparsity for c in counts),
    )
