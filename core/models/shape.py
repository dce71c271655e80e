"""The sizes that a model shares with its activations and its predictors, and of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsecast.core.models.expert_loop import expert_matrices
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
    experts: int = 0
    """Experts of each layer in a mixture, of `ffn_width` neurons each; 0 in a dense model."""
    experts_per_token: int = 0
    """Experts that the router chooses for a token."""

    @property
    def ffns(self) -> int:
        """FFNs with a predictor of their own: experts, or layers of a dense model."""
        return self.layers * max(1, self.experts)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Measure the shape on a model's weights."""
    family = family_of(model.config, str(model.config.name_or_path))
    layers = family.decoder_layers(model)
    if family.experts is not None:
        config: Any = model.config
        up_FD = expert_matrices(layers[0].get_submodule(family.experts), 0).up_FD
        return ModelShape(
            layers=len(layers),
            hidden_size=up_FD.shape[1],
            ffn_width=up_FD.shape[0],
            ffn_matrices=family.matrices,
            experts=config.num_local_experts,
            experts_per_token=config.num_experts_per_tok,
        )
    up = layers[0].get_submodule(family.up)
    assert isinstance(up, nn.Linear)
    return ModelShape(
        layers=len(layers),
        hidden_size=up.in_features,
        ffn_width=up.out_features,
        ffn_matrices=family.matrices,
    )


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Size of a model's weights in `dtype`."""
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
