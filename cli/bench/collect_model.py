"""The random model and documents of `sparsecast bench collect`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedModel

from sparsecast.core.models import pretrained
from sparsecast.core.text.tokens import Sequence

SHAPES = {
    "60m": (768, 2048, 8),
    "7b": (4096, 11008, 32),
}
"""(hidden size, FFN width, layers) of relu llamas with 57 million and 6.5 billion parameters in
their decoder layers."""
HEAD_DIM = 128
VOCAB = 32_000


def random_model(
    shape: tuple[int, int, int], seq_len: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A relu llama with random weights, the same in every run.

    Args:
        shape: See `SHAPES`.
    """
    hidden_size, ffn_width, layers = shape
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        vocab_size=VOCAB,
        hidden_act="relu",
        max_position_embeddings=seq_len,
    )
    torch.manual_seed(0)
    model = pretrained.random_model(config, device, dtype)
    model.eval()
    return model


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
