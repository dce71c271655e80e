"""Make one FATReLU threshold out of a threshold per layer or per neuron, without changing outputs.

FATReLU is positively homogeneous in gate and threshold together:

    fatrelu_{c t}(c g) = c fatrelu_t(g)    for c > 0

So neuron j with threshold t_j computes the same with threshold T once c_j = T / t_j is folded into
its weights:

    with a gate       row j and bias j of gate times c_j, row j and bias j of up divided by c_j
    without a gate    row j and bias j of up times c_j, column j of down divided by c_j

The config of a model has room for one threshold, `hidden_act_param`, and predictors and kernels
read one: after the fold that is enough. With a gate x1 keeps its values; without one, neuron j's
x1 grows by c_j and what it adds to the residual stream stays.

Shape letters: L layers, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsecast.core.models.families import Family, family_of, refuse_experts
from sparsecast.core.models.shape import model_shape


@torch.no_grad()
def fold_thresholds(model: PreTrainedModel, thresholds: Tensor | Sequence[Tensor]) -> float:
    """Rescale the FFNs of `model` in place so that one threshold does what many did.

    The caller puts `ActivationRule("fatrelu", T)` with the returned T into the model. T is the
    power of two next to the geometric mean of the thresholds, which every dtype holds exactly. The
    geometric mean of the scales is then within a factor of 1.42 of one. Weights of a usual size,
    0.01, stay in float16's normal range where thresholds lie within a factor of 100 of T;
    bfloat16 has the range of float32.

    Args:
        model: Of any dtype, best in float32; each scaled weight is rounded to it once.
        thresholds: One tensor per layer, (F,) or a single value: all positive, or all zero. Zero is
            plain ReLU, which no finite scale turns into a FATReLU. Give a neuron that should have
            none a threshold below what its gate reaches.

    Returns:
        T; 0 if all thresholds are zero, and the model is as it was.

    Raises:
        InputError: A mixture of experts.
        ValueError: Another number of layers or neurons; a threshold that is negative or not finite,
            or zero beside others that are not.
    """
    family = family_of(model.config, str(model.config.name_or_path))
    refuse_experts(model.config, str(model.config.name_or_path), "give a dense model")
    layers = family.decoder_layers(model)
    if len(thresholds) != len(layers):
        raise ValueError(
            f"thresholds: got {len(thresholds)} layers, but the model has {len(layers)}"
        )
    width = model_shape(model).ffn_width
    found = [_checked(threshold, width, number) for number, threshold in enumerate(thresholds)]
    if not any(bool(threshold_F.any()) for threshold_F in found):
        return 0.0
    for number, threshold_F in enumerate(found):
        if not bool(threshold_F.all()):
            raise ValueError(
                f"thresholds: layer {number} has {int((threshold_F == 0).sum())} of zero beside "
                "others that are positive, expected all positive or all zero; give these neurons a "
                "threshold below what their gates reach"
            )
    common = 2.0 ** round(torch.cat([threshold_F.log2() for threshold_F in found]).mean().item())
    for threshold_F, layer in zip(found, layers, strict=True):
        _rescale(family, layer, common / threshold_F)
    return common


def _checked(threshold: Tensor, width: int, layer: int) -> Tensor:
    """Return one layer's thresholds, (F,) float64 on the CPU."""
    values = threshold.detach().double().cpu()
    if values.shape not in ((), (1,), (width,)):
        raise ValueError(
            f"thresholds: layer {layer} has shape {tuple(values.shape)}, expected ({width},) or "
            "one value"
        )
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"thresholds: layer {layer} has one that is negative or not finite")
    return values.expand(width)


def _rescale(family: Family, layer: Any, scale_F: Tensor) -> None:
    up, down = (layer.get_submodule(path) for path in (family.up, family.down))
    first = up if family.gate is None else layer.get_submodule(family.gate)
    _scale_rows(first, scale_F)
    if family.gate is None:
        _multiply(down.weight, 1 / scale_F)
    else:
        _scale_rows(up, 1 / scale_F)


def _scale_rows(linear: Any, scale_F: Tensor) -> None:
    _multiply(linear.weight, scale_F[:, None])
    if linear.bias is not None:
        _multiply(linear.bias, scale_F)


def _multiply(weight: Tensor, scale: Tensor) -> None:
    weight.copy_(weight.double() * scale.to(weight.device))
