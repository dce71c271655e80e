"""The sizes that a model shares with its activations and its predictors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from sparsecast.core.models.families import family_of


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model's FFNs."""

    layers: int
    """Decoder layers."""
    hidden_size: int
    ffn_width: int
    """Neurons of one layer."""
    ffn_matrices: int
    """m of the traffic formulas: 3 with a gate, 2 without."""


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Measure the shape on a model's weights."""
    family = family_of(model.config, str(model.config.name_or_path))
    layers = family.decoder_layers(model)
    up = layers[0].get_submodule(family.up)
    assert isinstance(up, nn.Linear)
    return ModelShape(
        layers=len(layers),
        hidden_size=up.in_features,
        ffn_width=up.out_features,
        ffn_matrices=family.matrices,
    )
