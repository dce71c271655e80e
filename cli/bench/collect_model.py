"""The random model and documents of `sparsecast bench collect`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import LlamaConfig, PreTrainedModel

from sparsecast.core.errors import InputError
from sparsecast.core.models import pretrained
from sparsecast.core.text.tokens import Sequence


class Size(NamedTuple):
    """A relu llama's."""

    hidden: int
    ffn: int
    layers: int
    kv_heads: int


SHAPES = {
    "60m": Size(768, 2048, 8, 6),
    "7b": Size(4096, 11008, 32, 32),
    "70b": Size(8192, 28672, 80, 8),
}
"""With 57 million, 6.5 billion and 68 billion parameters in their decoder layers."""
HEAD_DIM = 128
VOCAB = 32_000


def random_model(
    size: Size,
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    device_map: str | None = None,
) -> PreTrainedModel:
    """A relu llama with random weights, the same in every run.

    Args:
        device_map: Spreads the model over all GPUs, as transformers does when it loads one;
            overrides `device`.

    Raises:
        InputError: The GPUs together do not hold it.
    """
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // HEAD_DIM,
        num_key_value_heads=size.kv_heads,
        vocab_size=VOCAB,
        hidden_act="relu",
        max_position_embeddings=seq_len,
    )
    torch.manual_seed(0)
    if device_map is None:
        model = pretrained.random_model(config, device, dtype)
    else:
        model = _spread(config, dtype, device_map)
    model.eval()
    return model


def _spread(config: LlamaConfig, dtype: torch.dtype, device_map: str) -> PreTrainedModel:
    """Build the model in parts, each on the device that it stays on.

    Memory: every device holds its own part, the host nothing.
    """
    model: Any = pretrained.random_model(config, torch.device("meta"), dtype)
    whole = list(model._no_split_modules)
    room = None
    if device_map != "sequential":
        room = get_balanced_memory(
            model, no_split_module_classes=whole, low_zero=device_map == "balanced_low_0"
        )
    places = infer_auto_device_map(model, room, no_split_module_classes=whole)
    if torch.cuda.is_available() and not {"cpu", "disk"}.isdisjoint(places.values()):
        raise InputError(
            f"--device-map {device_map}: the GPUs do not hold all of the model; give a smaller "
            "--shape or use more GPUs"
        )
    for name, device in places.items():
        model.get_submodule(name).to_empty(device=device)
    model.initialize_weights()
    spread: PreTrainedModel = dispatch_model(model, places)
    return spread


def random_rows(tokens: int, seq_len: int) -> Iterator[Sequence]:
    """Documents of random tokens.

    Their lengths are uniform up to twice `seq_len`, so that half of them are truncated.
    """
    draw = np.random.default_rng(0)
    left = tokens
    while left > 0:
        length = min(int(draw.integers(2, 2 * seq_len)), seq_len, left)
        yield Sequence("train", draw.integers(0, VOCAB, length).tolist(), length == seq_len)
        left -= length
