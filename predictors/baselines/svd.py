"""The whitened truncated SVD of the gate, a baseline without training.

Let S = E[x_hat x_hat^T] over the training tokens and W' the gate with the norm's weight folded in.
The best rank-r approximation on those inputs truncates W' S^(1/2) = U Z V^T to rank r:

    gate x_hat  ~  B A x_hat,   B = U_r Z_r,   A = V_r^T S^(-1/2)

(SVD-LLM, arXiv 2403.07378; as a predictor: arXiv 2603.14110). PowerInfer's format has a ReLU in the
middle, so by relu(z) - relu(-z) = z a linear predictor of rank r takes rank 2 r: fc1 = [A; -A],
fc2 = [B, -B]. The part of row j that truncation drops has a known standard deviation s_j, so
(B A x_hat - T) / s_j ranks neurons by the probability that they reach the threshold T.

Shape letters: D hidden, F FFN width, R rank of the linear predictor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.models.bitnet import effective_weight
from sparsecast.core.models.expert_loop import expert_matrices
from sparsecast.core.models.families import family_of
from sparsecast.core.models.ffns import place_of
from sparsecast.core.models.shape import model_shape
from sparsecast.predictors.calibration.bias import BiasUnits, UncalibratedPredictor, bias_units
from sparsecast.predictors.recorded_model import load_recorded
from sparsecast.predictors.training.warm_start import BIAS_SCALE, RIDGE, Moments, moments


def svd_predictors(
    model: str, store: ActivationStore, dtype: str, ranks: dict[int, int], device: torch.device
) -> dict[int, UncalibratedPredictor]:
    """Compress the gate of every layer, before calibration.

    Args:
        ranks: Number of an FFN to the rank of its predictor; see core/models/ffns.py.

    Memory: the model, and one layer's (D, D) and (F, D) matrices in float32.

    Raises:
        InputError: See `load_model`.
    """
    loaded = load_recorded(model, store, device)
    return {
        layer: whitened(
            moments(store, layer, device),
            *gate_of(loaded, layer),
            store.manifest.activation_threshold,
            (rank - bias_units(dtype)) // 2,
            rank - bias_units(dtype),
            dtype,
        )
        for layer, rank in ranks.items()
    }


def gate_of(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """The first projection (F, D) as it acts on x / rms(x), and its constant part (F,), float32.

    For a LayerNorm, the weights subtract the mean of x, and its variance is approximated by the
    mean square: scores come out slightly small if the mean is not zero.

    Args:
        layer: The number of an FFN, see core/models/ffns.py.
    """
    family = family_of(model.config, str(model.config.name_or_path))
    layer, expert = place_of(layer, model_shape(model).experts)
    block = family.decoder_layers(model)[layer]
    norm: Any = family.norm(block)
    if expert is not None and family.experts is not None:
        experts = block.get_submodule(family.experts)
        first: Any = None
        weight_FD = expert_matrices(experts, expert).gate_FD.detach().float()
    else:
        first = block.get_submodule(family.gate or family.up)
        weight_FD = effective_weight(first).float()
    constant_F = torch.zeros(len(weight_FD), device=weight_FD.device)
    if (bias := getattr(norm, "bias", None)) is not None:
        constant_F += weight_FD @ bias.detach().float()
    if (bias := getattr(first, "bias", None)) is not None:
        constant_F += bias.detach().float()
    if (scale_D := family.norm_scale(block)) is not None:
        weight_FD = weight_FD * scale_D
    if isinstance(norm, torch.nn.LayerNorm):
        weight_FD = weight_FD - weight_FD.mean(1, keepdim=True)
    return weight_FD, constant_F


def whitened(
    m: Moments,
    weight_FD: Tensor,
    constant_F: Tensor,
    threshold: float,
    linear_rank: int,
    units: int,
    dtype: str,
) -> BiasUnits:
    """Build one layer's predictor of rank `linear_rank`, padded to `units` hidden units."""
    eye = torch.eye(len(m.mean_D), device=m.mean_D.device)
    second_DD = m.second_DD + RIDGE * m.second_DD.diagonal().mean() * eye
    u_D = torch.linalg.solve(second_DD, m.mean_D)
    values, vectors = torch.linalg.eigh(second_DD)
    root_DD = vectors * values.sqrt() @ vectors.T
    inverse_DD = vectors * values.rsqrt() @ vectors.T
    left, strength, right = torch.linalg.svd(weight_FD @ root_DD, full_matrices=False)
    a_RD = right[:linear_rank] @ inverse_DD
    b_FR = left[:, :linear_rank] * strength[:linear_rank]
    dropped_F = (left[:, linear_rank:] * strength[linear_rank:]).square().sum(1).sqrt()
    whole_F = (left * strength).square().sum(1).sqrt()
    # A row that is kept whole drops nothing but rounding errors, so bound the divisor from below.
    scale_F = torch.maximum(dropped_F, 1e-2 * whole_F.mean()).clamp_min(1e-6).reciprocal()
    b_FR = b_FR * scale_F[:, None]
    offset_F = (constant_F - threshold) * scale_F
    spare = units - 2 * len(a_RD)
    return BiasUnits(
        torch.nn.functional.pad(torch.cat([a_RD, -a_RD]), (0, 0, 0, spare)).cpu(),
        torch.nn.functional.pad(torch.cat([b_FR, -b_FR], dim=1), (0, spare)).cpu(),
        (offset_F / BIAS_SCALE[dtype]).cpu(),
        (BIAS_SCALE[dtype] * u_D).cpu(),
        m.mean_D.cpu(),
        dtype,
    )
