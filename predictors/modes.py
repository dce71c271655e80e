"""The four ways of computing a model's FFNs that `sparsecast evaluate` compares.

    dense       the model as it is
    exact       up only where the gate fires, down only over active neurons; no predictor
    predicted   the predictors' masks and the model's own activation
    bundle      the predictors' masks, plain ReLU and weights rounded to f16, as PowerInfer computes

`predicted` and `bundle` differ for FATReLU models, because PowerInfer knows no threshold. A model
that PowerInfer cannot run, with ReLU² or with a mixture of experts, has no `bundle`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedModel

from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import set_activation
from sparsecast.core.models.scales import folded, scales_of, untie
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.model_in_loop import exact_in_loop, predictors_in_loop

Mode = Literal["dense", "exact", "predicted", "bundle"]
MODES: dict[Mode, str] = {
    "dense": "the model as it is",
    "exact": "only neurons whose gate fires are computed, without predictors",
    "predicted": "only predicted neurons are computed, with the model's own activation",
    "bundle": "only predicted neurons are computed, with plain ReLU and f16 weights, as PowerInfer "
    "does",
}
NO_BUNDLE = "not measured: PowerInfer runs neither ReLU² nor mixtures of experts"
T = TypeVar("T")


def has_bundle(model: PreTrainedModel) -> bool:
    """Return whether PowerInfer can run the model, so that `bundle` means something."""
    squared = activation_rule(model.config, "model").squared
    return not squared and family_of(model.config, "model").experts is None


def in_each_mode(
    model: PreTrainedModel, predictors: PredictorSet, measure: Callable[[Mode], T]
) -> dict[Mode, T | None]:
    """Call `measure` once in each mode; None for `bundle` if PowerInfer cannot run the model.

    Leaves the model rounded to f16 with plain ReLU if it can.
    """
    values: dict[Mode, T | None] = {}
    for mode in MODES:
        if mode == "bundle" and not has_bundle(model):
            values[mode] = None
            continue
        with in_mode(model, predictors, mode):
            values[mode] = measure(mode)
    return values


@contextmanager
def in_mode(model: PreTrainedModel, predictors: PredictorSet | None, mode: Mode) -> Iterator[None]:
    """Run a model in one mode; `bundle` leaves it rounded to f16 with plain ReLU, for good.

    Args:
        predictors: May be None for `dense` and `exact`.
    """
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    if mode == "dense":
        yield
        return
    if mode == "exact":
        with exact_in_loop(model):
            yield
        return
    assert predictors is not None
    if mode == "bundle":
        _round_as_bundle(model)
        if not activation_rule(model.config, "model").on_up:
            set_activation(model, ActivationRule("relu"))
    with predictors_in_loop(model, predictors):
        yield


@torch.no_grad()
def _round_as_bundle(model: PreTrainedModel) -> None:
    """Round every matrix to f16 in place, as a bundle stores it; vectors are f32 there.

    A bundle has no scales: it stores a Granite's or MiniCPM's weights with their factors.
    """
    if (scales := scales_of(model.config)) is not None:
        untie(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            factor = 1.0 if scales is None else scales.factor(name)
            parameter.copy_(folded(parameter, factor).half().float() / factor)
