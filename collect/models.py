"""Load a ReLU-sparse causal LM and its tokenizer from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsecast.collect.activations import ActivationRule
from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.errors import InputError
from sparsecast.collect.families import activation_rule, family_of, lost_threshold
from sparsecast.collect.progress import console
from sparsecast.collect.tokenizers import load_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if not found or not torch.cuda.is_available():
            raise InputError(
                f"--device: {name} was asked for but torch sees no CUDA device; use cpu"
            )
        if (device.index or 0) >= found:
            raise InputError(f"--device: got {name}, but torch sees {found} CUDA device(s), from 0")
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
        InputError: No such model, not a causal LM, a family without a row in the table, an
            activation that leaves no exact zeros (SiLU, GELU), or weights that do not fill the
            model that the config describes.
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
    model: Any = read_weights(checkpoint, pick_dtype(dtype, config.dtype, where), device_map)
    if device_map is None:
        model.to(where)
    set_activation(model, rule)
    return model.eval(), load_tokenizer(checkpoint)


def read_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device_map: str | None = None
) -> PreTrainedModel:
    """The model that the config describes, every weight of it from the checkpoint.

    transformers fills what is missing with random numbers; here that is an error. Tensors that
    the model has no place for are named and left out: TurboSparse keeps predictors there.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=checkpoint.config,
        dtype=dtype,
        device_map=device_map,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model: PreTrainedModel = loaded[0]
    found = loaded[1]
    for name, stored, wanted in sorted(found["mismatched_keys"], key=str):
        raise InputError(
            f"{checkpoint.folder}: tensor {name} is {list(stored)}, but config.json describes "
            f"{list(wanted)}; give the config and the weights of one model"
        )
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{checkpoint.folder}: tensor {missing[0]} is missing"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + "; download or save the weights again"
        )
    if extra := sorted(name for name in found["unexpected_keys"] if "predictor" not in name):
        console.print(
            f"{checkpoint.folder}: {len(extra)} tensors have no place in a "
            f"{checkpoint.config.model_type} model and are ignored, {extra[0]} first",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    return model


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


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that the model has an embedding for, from 0."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)


def check_length(seq_len: int, model: PreTrainedModel, name: str) -> None:
    """Raises `InputError` where sequences are longer than the model was made for."""
    if seq_len > (limit := positions(model)):
        raise InputError(
            f"--seq-len: got {seq_len}, but {name} was made for {limit} positions "
            "(max_position_embeddings); choose at most that"
        )


def positions(model: PreTrainedModel) -> float:
    """Tokens in a row that the model was made for.

    Linear and dynamic rope scaling stretch `max_position_embeddings`; with yarn and llama3 the
    config states the stretched number.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or float("inf")
    rope = getattr(model.config, "rope_parameters", None) or {}
    factor = rope.get("factor") if rope.get("rope_type") in ("linear", "dynamic") else None
    stretched: float = limit * max(1, factor or 1)
    return stretched
