"""The first layers of a model, to measure on them what all of it takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sparsecast.core.dry_run import seconds_of
from sparsecast.core.errors import InputError
from sparsecast.core.memory import check_memory, held, watch_memory
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import set_activation
from sparsecast.core.models.pretrained import load_pretrained, random_model

INSTEAD = "choose a smaller --dtype, another --device, or a smaller model"


def first_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """Return the config of a model that has the first `count` decoder layers alone."""
    cut: Any = copy.deepcopy(config)
    cut.num_hidden_layers = count
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:count]
    return cut  # type: ignore[no-any-return]


def load_first_layers(
    checkpoint: Checkpoint,
    count: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rule: ActivationRule,
) -> Any:
    """Load the first layers with embedding and head; random weights if the folder has none.

    Args:
        rule: The activation to put in.
    """
    cut = first_layers(checkpoint.config, count)
    if checkpoint.files:
        model: Any = load_pretrained(
            checkpoint.folder, cut, safetensors=checkpoint.safetensors, dtype=dtype
        )[0]
    else:
        model = random_model(cut, torch.device("cpu"))
        model.to(dtype)
    model.to(device)
    set_activation(model, rule)
    return model.eval()


def keeps_own_copy(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Return whether a model on the CPU has weights of its own: those that are stored in its dtype
    stay maps of their files, whose pages the system may drop and read again.

    The larger part of the stored bytes decides; in a folder without weights config.json does.
    """
    if not checkpoint.files:
        stored = checkpoint.config.dtype
        return isinstance(stored, torch.dtype) and stored != dtype
    mapped = converted = 0
    for _, tensor in checkpoint.tensors():
        if tensor.dtype == dtype:
            mapped += tensor.nbytes
        else:
            converted += tensor.nbytes
    return converted > mapped


def check_model_memory(
    out: object, device: torch.device, dtype: torch.dtype, nbytes: int, *, own: bool
) -> None:
    """Raise `InputError` if a model's weights alone are more than its device can hold.

    Args:
        out: What the message begins with.
        nbytes: Of the weights in `dtype`.
        own: See `keeps_own_copy`.
    """
    on_cpu = device.type == "cpu"
    check_memory(
        f"{out}: the model in {str(dtype).removeprefix('torch.')}",
        device,
        host=nbytes if on_cpu and own else 0,
        on_device=0 if on_cpu else nbytes,
        instead=INSTEAD,
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The first layers of a model, loaded and used."""

    weights: int
    """Bytes."""
    own_weights: bool
    """Whether they take main memory of their own, rather than map their file."""
    load_seconds: float
    seconds: float
    host: int
    """Bytes of main memory that the use took on top of the model."""
    on_device: int
    """The same on a GPU."""


def measure(
    load: Callable[[], PreTrainedModel],
    use: Callable[[PreTrainedModel], float],
    device: torch.device,
) -> Measured:
    """Load some layers and use them.

    Args:
        use: Works with the model, and returns the seconds that count.

    Raises:
        InputError: They do not fit `device`.
    """
    on_gpu = device.type == "cuda"
    models: list[PreTrainedModel] = []
    before = held().own
    try:
        load_seconds = seconds_of(lambda: models.append(load()), device)
        loaded, allocated = held().own, torch.cuda.memory_allocated(device) if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        with watch_memory() as peak:
            seconds = use(models[0])
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{device}: has too little memory for a batch on the model's first layers; choose a "
            "smaller --batch-size, or free the device"
        ) from error
    weights = sum(weight.nbytes for weight in models[0].parameters())
    return Measured(
        weights=weights,
        own_weights=2 * (loaded - before) > weights,
        load_seconds=load_seconds,
        seconds=seconds,
        host=max(0, peak.own - loaded),
        on_device=torch.cuda.max_memory_allocated(device) - allocated if on_gpu else 0,
    )


def model_memory(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    nbytes: int,
    measured: Measured | None,
    others: Mapping[str, int],
    *,
    rounded: bool = False,
) -> tuple[dict[str, int], int, dict[str, int]]:
    """Return main memory by use, mapped pages on top of it, and a GPU's memory by use.

    Args:
        nbytes: Of the model's weights in `dtype`.
        measured: One layer; None if nothing was.
        others: Main memory of other uses.
        rounded: Whether weights change in place, which makes copies of mapped ones.
    """
    files = sum(path.stat().st_size for path in checkpoint.files)
    own, on_gpu = keeps_own_copy(checkpoint, dtype), device.type == "cuda"
    batch = 0 if measured is None else measured.host
    if not (own or rounded or on_gpu):  # the system drops mapped pages and reads them again
        return {"a batch": batch, **others}, max(files, nbytes), {}
    running = {"weights": 0 if on_gpu else nbytes, "a batch": batch, **others}
    loading = {"weights while they are loaded": nbytes if own else 0}
    host = max(running, loading, key=lambda uses: sum(uses.values()))
    while_loading = (nbytes if own else 0) + files
    pages = max(0, while_loading - sum(host.values()))
    on_device = {} if measured is None else {"a batch": measured.on_device}
    return host, pages, {"weights": nbytes, **on_device} if on_gpu else {}
