"""Initial weights: the best linear predictor of the given rank, written with ReLU units.

The gate is linear in the normalized input, so a linear predictor is a strong start. PowerInfer's
format has a ReLU in the middle, and the identity relu(z) - relu(-z) = z takes two units per rank.
One unit is enough if the inputs have a nearly constant direction u (u x_hat ~ 1, see
predictors/calibration/bias.py): relu(z + K u x_hat) is linear while z > -K, and K u x_hat moves
into the bias units.

The linear predictor is the reduced-rank regression of the mask y on the inputs: with whitened,
centered inputs x_w = S^(-1/2) (x_hat - m) and C = E[(y - E y) x_w^T], the best rank-r map is
C V V^T, where V holds the top r eigenvectors of C^T C. The derivative of the logit, 1 / p (1 - p),
turns its slopes into slopes of logits. Training weights inactive entries by the layer's share of
active ones, so the logarithm of that share is subtracted from the offsets.

f16 has no units for the offsets (predictors/calibration/bias.py). If z has unit variance, the
combination of R hidden units nearest to 1 has the coefficient K / (1 + K^2 R) on each, so every
column takes that part of the offset.

Shape letters: L layers, T tokens, D hidden, F FFN width, R free hidden units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.models.shape import ModelShape
from sparsecast.core.progress import progress_bar
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.predictor import rms_normalized

RIDGE = 1e-3
"""Ridge of the regression, relative to the mean variance of an input."""
LEAST_RATE = 1e-3
"""Floor on the active rate of layers that rarely fire."""
LINEAR_REACH = 4.0
"""K: how many standard deviations below its mean a hidden unit stays linear."""
BIAS_SCALE = {"f16": 1.0, "q8_0": 4 * LINEAR_REACH, "q4_0": 4 * LINEAR_REACH}
"""b relative to u x_hat. In quantized formats the offsets share a block with columns of fc2, and b
with other hidden units, which are about `LINEAR_REACH`; four times that keeps both within the range
of their blocks."""


class WarmStart(NamedTuple):
    """Initial weights of all layers' predictors; in f16 without bias, mean input and offset."""

    bias_LD: Tensor | None
    mean_LD: Tensor | None
    """Of the RMS-normalized inputs."""
    fc1_LRD: Tensor
    """Layers of smaller rank are padded with zero units, here and in fc2."""
    fc2_LFR: Tensor
    offset_LF: Tensor | None
    rate_L: Tensor
    """Share of active entries of each layer."""


class Moments(NamedTuple):
    """Moments of x_hat and of the mask y over the training tokens of one layer."""

    second_DD: Tensor
    mean_D: Tensor
    cross_FD: Tensor
    """E[y x_hat^T]."""
    rate_F: Tensor


def warm_start(of_layers: Iterable[Moments], free_units: Sequence[int], dtype: str) -> WarmStart:
    """Initial weights of all layers.

    Args:
        of_layers: Moments of each layer's training tokens, taken one layer at a time.
        free_units: Trained hidden units of each layer, without bias units.
        dtype: Format that the predictors are trained for.
    """
    starts = []
    with progress_bar("warm start", len(free_units)) as progress:
        for m, free in zip(of_layers, free_units, strict=True):
            u_D, fc1_RD, fc2_FR, offset_F = (t.cpu() for t in reduced_rank(m, free))
            rate = m.rate_F.mean().clamp_min(LEAST_RATE).cpu()
            offset_F -= rate.log()
            if dtype == "f16":
                fc2_FR += LINEAR_REACH / (1 + LINEAR_REACH**2 * free) * offset_F[:, None]
            spare = max(free_units) - free
            starts.append(
                (
                    BIAS_SCALE[dtype] * u_D,
                    m.mean_D.cpu(),
                    nn.functional.pad(fc1_RD, (0, 0, 0, spare)),
                    nn.functional.pad(fc2_FR, (0, spare)),
                    offset_F / BIAS_SCALE[dtype],
                    rate,
                )
            )
            progress.advance()
    start = WarmStart(*(torch.stack(parts) for parts in zip(*starts, strict=True)))
    if dtype == "f16":
        return start._replace(bias_LD=None, mean_LD=None, offset_LF=None)
    return start


def no_start(shape: ModelShape, free_units: Sequence[int], dtype: str) -> WarmStart:
    """Zeros of the right shapes, for a checkpoint to replace."""
    hidden_size, ffn_width = shape.hidden_size, shape.ffn_width
    layers, units, quantized = len(free_units), max(free_units), dtype != "f16"
    return WarmStart(
        torch.zeros(layers, hidden_size) if quantized else None,
        torch.zeros(layers, hidden_size) if quantized else None,
        torch.zeros(layers, units, hidden_size),
        torch.zeros(layers, ffn_width, units),
        torch.zeros(layers, ffn_width) if quantized else None,
        torch.zeros(layers),
    )


class MomentSums:
    """Sums that become `Moments`. Memory: (D, D) and (F, D) in float32 on the device."""

    def __init__(self, hidden_size: int, ffn_width: int, device: torch.device) -> None:
        self._tokens = 0
        self._sums = [
            torch.zeros(shape, device=device)
            for shape in (
                (hidden_size, hidden_size),
                (hidden_size,),
                (ffn_width, hidden_size),
                (ffn_width,),
            )
        ]

    def add(self, x_TD: Tensor, active_TF: Tensor) -> None:
        """Add raw inputs and their mask."""
        x, y = rms_normalized(x_TD), active_TF.float()
        self._tokens += len(x)
        for total, more in zip(self._sums, (x.T @ x, x.sum(0), y.T @ x, y.sum(0)), strict=True):
            total += more

    def mean(self) -> Moments:
        return Moments(*(total / max(1, self._tokens) for total in self._sums))


def moments(store: ActivationStore, layer: int, device: torch.device) -> Moments:
    """Moments of one layer's train split."""
    sums = MomentSums(store.manifest.hidden_size, store.manifest.ffn_width, device)
    for x_TD, active_TF in layer_batches(store, "train", layer, device=device):
        sums.add(x_TD, active_TF)
    return sums.mean()


def reduced_rank(m: Moments, free_units: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit one layer: u (D,), fc1 (R, D), fc2 (F, R) and offset (F,)."""
    eye = torch.eye(len(m.mean_D), device=m.mean_D.device)
    energy = m.second_DD.diagonal().mean()
    u_D = torch.linalg.solve(m.second_DD + RIDGE * energy * eye, m.mean_D)
    covariance = m.second_DD - torch.outer(m.mean_D, m.mean_D)
    floor = (RIDGE * covariance.diagonal().mean()).clamp_min(1e-6)
    values, vectors = torch.linalg.eigh(covariance + floor * eye)
    # Rounding may push the smallest eigenvalues below the floor that was added.
    whiten_DD = vectors * torch.maximum(values, floor / 2).rsqrt() @ vectors.T
    cross_FD = (m.cross_FD - torch.outer(m.rate_F, m.mean_D)) @ whiten_DD
    _, basis = torch.linalg.eigh(cross_FD.T @ cross_FD)
    # Strongest first, so that units sharing a block of a quantized row have similar scales.
    basis_DR = basis[:, -min(free_units, basis.shape[1]) :].flip(1)
    # z = V^T S^(-1/2) (x_hat - m), with m written as m u x_hat.
    linear_RD = basis_DR.T @ whiten_DD
    linear_RD = linear_RD - torch.outer(linear_RD @ m.mean_D, u_D)
    rate_F = m.rate_F.clamp(1e-3, 1 - 1e-3)
    fc2_FR = cross_FD @ basis_DR / (rate_F * (1 - rate_F))[:, None]
    offset_F = rate_F.logit() - LINEAR_REACH * fc2_FR.sum(1)
    fc1_RD = linear_RD + LINEAR_REACH * u_D
    if (more := free_units - len(fc1_RD)) > 0:
        # More units than input dimensions: duplicate some, and halve their columns.
        fc1_RD = torch.cat([fc1_RD, fc1_RD[:more]])
        fc2_FR = torch.cat([fc2_FR, fc2_FR[:, :more] / 2], dim=1)
        fc2_FR[:, :more] /= 2
    return u_D, fc1_RD, fc2_FR, offset_F
