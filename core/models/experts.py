"""The experts of a model: their modules, and the loops that run them (expert_loop.py)."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from sparsecast.core.errors import InputError
from sparsecast.core.models.expert_loop import ExpertLoop
from sparsecast.core.models.families import family_of


def expert_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the module of experts of every layer; the model's family must have experts."""
    family = family_of(model.config, str(model.config.name_or_path))
    assert family.experts is not None
    return [layer.get_submodule(family.experts) for layer in family.decoder_layers(model)]


def expert_loops(model: PreTrainedModel) -> list[ExpertLoop]:
    """Return the loops that `install_loops` has put into a model, one per layer."""
    return [cast(ExpertLoop, experts.forward) for experts in expert_modules(model)]


def install_loops(model: PreTrainedModel, *, relu_up: bool) -> None:
    """Make every layer run its experts by an `ExpertLoop`, in place.

    Raises:
        InputError: --device-map has moved experts off.
    """
    for experts in expert_modules(model):
        if any(weight.is_meta for weight in experts.parameters()):
            raise InputError(
                "--device-map: has moved experts off the devices, and their activations cannot be "
                "seen there; use more devices"
            )
        experts.forward = ExpertLoop(experts, relu_up=relu_up)
