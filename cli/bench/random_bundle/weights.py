"""The values of a random bundle's tensors, in blocks of rows.

Every row is a window of one pool of random numbers, which begins a block of 32 after the row
before it; each tensor begins somewhere else. Speed does not depend on values, so attention, up,
down and output are such windows, scaled. Three tensors are made of them:

- An embedding has the same number in channels 0 to 31 and normal numbers of its own in the others.
  Its root mean square is `RESIDUAL`, so a norm divides by exactly that. What attention and the FFN
  add has 1 / 1024 of that size; after 104 additions the residual is still the embedding, but for
  1 %.
- A gate reads its `mean + spread n` (design.py) from channels 0 to 31, `seen a` from the next S and
  `unseen b` from all others.
- A predictor's hidden units are channels 0 to 31 (which are positive), then the S channels, then
  the S channels negated. Since relu(x) - relu(-x) = x, fc2 writes any sum of these channels: it has
  the gate's own weights of the S channels, and `start + spread n` over the first units. S is the
  largest multiple of 32 for which the rank suffices.

The pool is rounded to the coarser of the model's and the predictor's format, window by block, so
the gate and its predictor hold the same numbers and rounding again changes them by no more than
2^-11. No weight is small enough to be subnormal in f16, except where the design's own are near 0.

Shape letters: N rows of a block, D hidden, F FFN width, S channels that the predictor reads,
R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

from sparsecast.cli.bench.export_model import ModelShape
from sparsecast.cli.bench.random_bundle.design import Design, design_for, neurons
from sparsecast.cli.bench.random_bundle.points import Point
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.predictors.formats import BITS, rounded

POOL = 2**21
"""Numbers in a pool."""
ROWS = 2**18
"""Weights of a block of rows."""
RESIDUAL = 64.0
"""Size of the residual stream: what is added to it is not subnormal in f16."""
ADDED = RESIDUAL / 1024
"""Root mean square of what one attention or FFN adds to it, at most."""
LOGIT = 2.0
"""Standard deviation of the logits."""


class RandomWeights:
    """A model's values by tensor.

    Memory: 17 MB of pools, and one block of rows at a time.
    """

    def __init__(self, shape: ModelShape, dtype: str, point: Point, seed: int = 0) -> None:
        """
        Args:
            dtype: Of the model's matrices, f16 or q4_0.
        """
        self._shape, self._point, self._seed = shape, point, seed
        self.design: Design = design_for(point)
        self.seen = (point.rank - BLOCK) // (2 * BLOCK) * BLOCK
        """S."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (POOL,), generator=generator) * 2 - 1
        sizes = torch.rand(POOL, generator=generator) + 0.5
        normal = torch.randn(POOL, generator=generator)
        self._weights = rounded(signs * sizes, min(dtype, point.format, key=BITS.__getitem__))
        self._embeddings = rounded(normal, dtype)

    def neurons(self, layer: int) -> Tensor:
        """Return n of every neuron (design.py), (F,) float64."""
        generator = torch.Generator().manual_seed(self._seed * 1000 + layer)
        return neurons(self._shape.ffn, generator)

    def embedding(self) -> Iterator[Tensor]:
        """Yield blocks of (N, D) float32."""
        size = math.sqrt(self._shape.hidden - BLOCK)
        for _, rows_ND in self._windows(self._embeddings, "token_embd", self._shape.vocab):
            rows_ND[:, BLOCK:] = _sized(rows_ND[:, BLOCK:], size)
            rows_ND[:, :BLOCK] = 1
            yield rows_ND * RESIDUAL

    def gate(self, layer: int) -> Iterator[Tensor]:
        """Yield blocks of (N, D) float32."""
        n_F, read = self.neurons(layer), BLOCK + self.seen
        for first, rows_ND in self._gate_windows(layer):
            n_N = n_F[first : first + len(rows_ND)]
            constant_N = (self.design.mean + self.design.spread * n_N) / BLOCK
            rows_ND[:, :BLOCK] = constant_N.float()[:, None]
            rows_ND[:, BLOCK:read] = _sized(rows_ND[:, BLOCK:read], self.design.seen)
            rows_ND[:, read:] = _sized(rows_ND[:, read:], self.design.unseen)
            yield rows_ND

    def fc1(self) -> Iterator[Tensor]:
        """Yield fc1, (R, D) float32, in one block for each block of channels that it reads."""
        blocks = self._channel_blocks()
        for channel, sign in blocks:
            rows_ND = torch.zeros(BLOCK, self._shape.hidden)
            rows_ND[:, channel : channel + BLOCK] = sign * torch.eye(BLOCK)
            yield rows_ND

    def fc2(self, layer: int) -> Iterator[Tensor]:
        """Yield blocks of (N, R) float32."""
        n_F, read = self.neurons(layer), BLOCK + self.seen
        constants = self._point.rank - 2 * self.seen
        for first, rows_ND in self._gate_windows(layer):
            n_N = n_F[first : first + len(rows_ND)]
            constant_N = (self.design.start + self.design.spread * n_N) / constants
            seen_NS = _sized(rows_ND[:, BLOCK:read], self.design.seen)
            yield torch.cat(
                [constant_N.float()[:, None].expand(-1, constants), seen_NS, -seen_NS], 1
            )

    def other(self, name: str, rows: int) -> Iterator[Tensor]:
        """Yield blocks of (N, D) float32 of a matrix whose values nothing depends on.

        Args:
            name: In PowerInfer's file.
        """
        scale = self._scale(name.split(".")[-2])
        for _, rows_ND in self._windows(self._weights, name, rows):
            yield rows_ND * scale

    def _scale(self, kind: str) -> float:
        """Return a matrix's factor: outputs of size 1, `LOGIT`, or `ADDED` for a residual."""
        unit = 1 / math.sqrt(self._shape.hidden)
        if kind == "attn_output":
            return ADDED * unit
        if kind == "ffn_down_t":
            return ADDED / self._x1_norm()
        return LOGIT * unit if kind == "output" else unit

    def _x1_norm(self) -> float:
        """Return the expected norm of x1 = relu(g) u with u of variance 1.

        For a normal g of mean m and deviation s, E[relu(g)^2] is
        (m^2 + s^2) Phi(m / s) + m s phi(m / s).
        """
        m, s = self.design.mean, math.sqrt(1 + self.design.spread**2)
        density = math.exp(-((m / s) ** 2) / 2) / math.sqrt(2 * math.pi)
        fires = 1 - self._point.true_sparsity
        return math.sqrt(self._shape.ffn * ((m * m + s * s) * fires + m * s * density))

    def _channel_blocks(self) -> list[tuple[int, int]]:
        """List the first channel and the sign of every 32 hidden units."""
        channels = range(BLOCK, BLOCK + self.seen, BLOCK)
        signed = [(channel, sign) for sign in (1, -1) for channel in channels]
        return [(0, 1)] * (self._point.rank // BLOCK - len(signed)) + signed

    def _gate_windows(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        return self._windows(self._weights, f"blk.{layer}.ffn_gate.weight", self._shape.ffn)

    def _windows(self, pool: Tensor, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of the first row and (N, D) windows, which the caller may change."""
        window_WD = pool.unfold(0, self._shape.hidden, BLOCK)
        start = Random(f"{self._seed} {name}").randrange(len(window_WD))
        for first in range(0, rows, step := max(1, ROWS // self._shape.hidden)):
            row_N = torch.arange(first, min(first + step, rows))
            yield first, window_WD[(start + row_N) % len(window_WD)]


def _sized(rows_NC: Tensor, norm: float) -> Tensor:
    """Scale every row to a norm."""
    scale_N1: Tensor = norm / torch.linalg.vector_norm(rows_NC, dim=1, keepdim=True)
    return rows_NC * scale_N1
