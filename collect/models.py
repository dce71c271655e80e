"""Load a ReLU-sparse causal LM and its tokenizer from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsecast.collect.activations import ActivationRule
from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.errors import InputError
from sparsecast.collect.families import activation_rule, family_of, lost_threshold
from sparsecast.collect.progress import console

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"--device: no device is called {name!r}; use auto, cpu or cuda"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: {name} was asked for but torch sees no CUDA device; use cpu")
    return device


def pick_dtype(name: str, stored: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's dtype on a GPU and float32 on the CPU, where half is slow."""
    if name == "auto":
        on_gpu = stored if isinstance(stored, torch.dtype) else torch.bfloat16
        return torch.float32 if device.type == "cpu" else on_gpu
    if name not in DTYPES:
        raise InputError(f"--dtype: got {name!r}, expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    activation_threshold: float | None = None,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A sparse causal LM in eval mode with its activation's threshold set, and its tokenizer.

    Args:
        source: Folder or Hugging Face id.
        device, dtype: See `pick_device` and `pick_dtype`.
        activation_threshold: FATReLU's T where the config has lost it.
        device_map: How transformers spreads a model over devices (auto, balanced, sequential);
            overrides `device`.

    Raises:
        InputError: No such model, not a causal LM, a family without a row in the table, or an
            activation that leaves no exact zeros (SiLU, GELU).
    """
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    default = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "no architecture")
    if not any(name.endswith("ForCausalLM") for name in config.architectures or [default]):
        raise InputError(
            f"{source}: architectures is {config.architectures}, expected a causal language model "
            "(...ForCausalLM)"
        )
    family_of(config, source)
    rule = activation_rule(config, source, activation_threshold)
    checkpoint.check()
    if activation_threshold is None and (warning := lost_threshold(config, source)):
        console.print(warning, style="yellow", highlight=False)
    where = pick_device(device)
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=config,
        dtype=pick_dtype(dtype, config.dtype, where),
        device_map=device_map,
    )
    if device_map is None:
        model.to(where)
    set_activation(model, rule)
    return model.eval(), load_tokenizer(checkpoint)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer beside the weights."""
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{checkpoint.folder}: no usable tokenizer ({reason}); expected tokenizer.json or "
            "tokenizer.model beside config.json"
        ) from error
    return tokenizer


def set_activation(model: PreTrainedModel, rule: ActivationRule) -> None:
    """Put the activation of `rule` into every FFN of `model`, in place."""
    family = family_of(model.config, str(model.config.name_or_path))
    parent, _, name = family.act.rpartition(".")
    for layer in family.decoder_layers(model):
        setattr(layer.get_submodule(parent), name, rule.module())
        if rule.on_up:
            layer.get_submodule(family.up).register_forward_hook(_relu)


def _relu(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output.relu()


def ffn_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(layers, hidden size, FFN width), measured on the weights."""
    family = family_of(model.config, str(model.config.name_or_path))
    layers = family.decoder_layers(model)
    up = layers[0].get_submodule(family.up)
    assert isinstance(up, nn.Linear)
    return len(layers), up.in_features, up.out_features
