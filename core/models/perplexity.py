"""Perplexity of a causal LM on given batches: one definition for every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsecast.core.errors import InputError
from sparsecast.core.text.tokens import TokenBatch


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    data: Iterable[TokenBatch],
    on_batch: Callable[[TokenBatch], object] = lambda batch: None,
) -> float:
    """Return exp of the mean NLL in float32, over all tokens but each document's first.

    Args:
        on_batch: Called with every batch, on the model's device, before its forward pass.
    """
    nll, predicted = 0.0, 0
    for cpu_batch in data:
        batch = cpu_batch.to(model.device)
        on_batch(batch)
        logits = model(batch.ids_BS, use_cache=False).logits
        # Right padding: causal attention needs no mask to keep it out of real tokens.
        keep = batch.keep_BS[:, 1:]
        target = batch.ids_BS[:, 1:][keep]
        loss = nn.functional.cross_entropy(logits[:, :-1][keep].float(), target, reduction="sum")
        nll += loss.item()
        predicted += len(target)
    return math.exp(nll / predicted)


def dense_perplexity(
    model: PreTrainedModel,
    data: Iterable[TokenBatch],
    on_batch: Callable[[TokenBatch], object] = lambda batch: None,
) -> float:
    """Return `perplexity` of a model as it is, which others are compared with.

    Raises:
        InputError: It is not a finite number: the model overflows in its dtype.
    """
    value = perplexity(model, data, on_batch)
    if not math.isfinite(value):
        raise InputError(
            f"{model.config.name_or_path}: its perplexity is {value} in "
            f"{str(model.dtype).removeprefix('torch.')}, so the model itself overflows; run it "
            "with --dtype bfloat16 or float32, and check its weights"
        )
    return value
