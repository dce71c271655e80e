"""The model that an activation store was recorded from, loaded again."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model


def check_recorded(model: str, store: ActivationStore) -> None:
    """Refuse any model but the one that was recorded."""
    if Checkpoint(model).fingerprint != store.manifest.fingerprint:
        raise InputError(
            f"--model {model}: is not the model that {store.folder} was recorded from "
            f"({store.manifest.model}); give that one"
        )


def load_recorded(
    model: str, store: ActivationStore, device: torch.device | str
) -> PreTrainedModel:
    """With the activation threshold that it was recorded with.

    Raises:
        InputError: See `load_model`.
    """
    made = store.manifest
    loaded, _ = load_model(
        model,
        device=str(device),
        activation_threshold=made.activation_threshold if made.activation == "fatrelu" else None,
    )
    return loaded
