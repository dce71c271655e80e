"""Load the model that an activation store was recorded from."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model


def check_recorded(model: str, store: ActivationStore) -> None:
    """Refuse any model but the recorded one."""
    if Checkpoint(model).fingerprint != store.manifest.fingerprint:
        raise InputError(
            f"--model {model}: is not the model that {store.folder} was recorded from; give "
            f"{store.manifest.model}"
        )


def load_recorded(
    model: str, store: ActivationStore, device: torch.device | str
) -> PreTrainedModel:
    """Load the recorded model with the activation threshold of the recording.

    Raises:
        InputError: See `load_model`.
    """
    recorded = store.manifest
    fatrelu = recorded.activation == "fatrelu"
    loaded, _ = load_model(
        model,
        device=str(device),
        activation_threshold=recorded.activation_threshold if fatrelu else None,
    )
    return loaded
