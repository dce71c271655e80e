"""Load a ReLU-sparse causal LM and its tokenizer from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsecast.core.errors import InputError
from sparsecast.core.messages import log
from sparsecast.core.models.activations import ActivationRule, relu_output
from sparsecast.core.models.bitnet import check_compiles, rounds_online
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.experts import install_loops
from sparsecast.core.models.families import activation_rule, family_of, lost_threshold_warning
from sparsecast.core.models.pretrained import load_pretrained
from sparsecast.core.models.remote_configs import ignored_activation
from sparsecast.core.options import short_repr
from sparsecast.core.tokenizers.loading import load_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """Return the device for `name`; `auto` is CUDA if there is one, else the CPU."""
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
    """Return the dtype for `name`; `auto` is the checkpoint's on a GPU, float32 on a CPU."""
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
    """Load a sparse causal LM, in eval mode with its threshold set, and its tokenizer.

    Args:
        source: Folder, Hugging Face id, or tiny-prosparse; see `resolve_model`.
        device: See `pick_device`.
        dtype: See `pick_dtype`.
        activation_threshold: FATReLU's T where the config has lost it.
        device_map: How transformers spreads a model over devices (auto, balanced, sequential);
            overrides `device`.

    Raises:
        InputError: See `open_model` and `check_compiles`; an activation that leaves no exact zeros
            (SiLU, GELU).
    """
    checkpoint = Checkpoint(source)
    family_of(checkpoint.config, source)
    rule = activation_rule(checkpoint.config, source, activation_threshold)
    where = pick_device(device)
    picked = pick_dtype(dtype, checkpoint.config.dtype, where)
    check_threshold(rule, picked, source)
    tokenizer = check_checkpoint(checkpoint)
    if activation_threshold is None and (
        warning := lost_threshold_warning(checkpoint.config, source)
    ):
        log.warning(warning)
    if (named := ignored_activation(checkpoint.raw_config)) is not None:
        log.warning(
            f"{source}: config.json says {short_repr(named)}, but the code of this type has ReLU "
            "whatever it says; relu is used"
        )
    model: Any = build_model(checkpoint, picked, device_map)
    if device_map is None:
        model.to(where)
    if rounds_online(checkpoint.config):
        check_compiles(input_device(model))
    set_activation(model, rule)
    return model.eval(), tokenizer


def open_model(source: str) -> tuple[Checkpoint, Tokenizer]:
    """Open a model's files and run every check that needs no weights in memory.

    The activation is not checked: `load_model` requires ReLU, and `sparsify` substitutes it. This
    reads headers, the config and the tokenizer, in seconds for a model of any size. `build_model`
    loads the model from the result.

    Args:
        source: Folder, Hugging Face id, or tiny-prosparse; see `resolve_model`.

    Raises:
        InputError: No such model; not a causal LM of a known family; weights that are missing,
            truncated, unreadable, quantized, Git LFS pointers, accompanied by an adapter, or unlike
            the config; no usable tokenizer; tokens beyond the embedding.
    """
    checkpoint = Checkpoint(source)
    return checkpoint, check_checkpoint(checkpoint)


def check_checkpoint(checkpoint: Checkpoint) -> Tokenizer:
    """Run the checks of `open_model` on an open checkpoint; return its tokenizer."""
    config, source = checkpoint.config, checkpoint.source
    default = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "no architecture")
    if not any(str(name).endswith("ForCausalLM") for name in config.architectures or [default]):
        raise InputError(
            f"{source}: architectures is {short_repr(config.architectures)}, expected a causal "
            "language model (...ForCausalLM)"
        )
    family_of(config, source)
    checkpoint.check()
    tokenizer = load_tokenizer(checkpoint)
    check_token_ids(tokenizer, config.vocab_size, checkpoint.folder)
    return tokenizer


def check_token_ids(tokenizer: Tokenizer, rows: int, where: object) -> None:
    """Refuse a tokenizer that can produce ids beyond the embedding's `rows`.

    Special tokens other than BOS may lie beyond: many models have a padding token there that no
    text produces. `tokenize_documents` names a document that does produce one.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special} - {tokenizer.bos_token_id}
    beyond = [
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and number not in special
    ]
    if beyond:
        number, token = min(beyond)
        raise InputError(
            f"{where}: the tokenizer has {short_repr(token)} as id {number:,}, but the model has "
            f"an embedding for ids 0 to {rows - 1:,} (vocab_size); give the tokenizer that the "
            "model was trained with"
        )


def check_threshold(rule: ActivationRule, dtype: torch.dtype, where: str) -> None:
    """Refuse a threshold that is infinite in the model's dtype: no neuron would fire."""
    if not torch.tensor(rule.threshold, dtype=torch.float64).to(dtype).isfinite():
        raise InputError(
            f"{where}: FATReLU's threshold {rule.threshold:g} is infinite in "
            f"{str(dtype).removeprefix('torch.')}, so nothing would ever fire; expected at most "
            f"{torch.finfo(dtype).max:g}"
        )


def build_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device_map: str | None = None
) -> PreTrainedModel:
    """Build the model that the config describes, with every weight from the checkpoint.

    A missing tensor, which transformers would fill with random numbers, is an error. Tensors
    without a place in the model are named and skipped: TurboSparse keeps predictors there.
    """
    model, found = load_pretrained(
        checkpoint.folder,
        checkpoint.config,
        safetensors=checkpoint.safetensors,
        dtype=dtype,
        device_map=device_map,
    )
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
        log.warning(
            f"{checkpoint.folder}: {len(extra)} tensors have no place in a "
            f"{checkpoint.config.model_type} model and are ignored, {extra[0]} first"
        )
    return model


def set_activation(model: PreTrainedModel, rule: ActivationRule) -> None:
    """Put the activation of `rule` into every FFN of `model`, in place; experts get their loops."""
    family = family_of(model.config, str(model.config.name_or_path))
    if family.experts is not None:
        install_loops(model, relu_up=rule.on_up)
    parent, _, name = family.act.rpartition(".")
    for layer in family.decoder_layers(model):
        setattr(layer.get_submodule(parent), name, rule.module())
        if rule.on_up and family.experts is None:
            layer.get_submodule(family.up).register_forward_hook(relu_output)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device for token ids, also if the model is spread over several devices."""
    return next((w.device for w in model.parameters() if not w.is_meta), torch.device("cpu"))


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of token ids, from 0, that the model has an embedding for."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)


def check_seq_len(seq_len: int, model: PreTrainedModel, name: str) -> None:
    """Raise `InputError` if sequences are longer than the model supports."""
    if seq_len > (limit := max_positions(model)):
        raise InputError(
            f"--seq-len: got {seq_len}, but {name} was made for {limit} positions "
            "(max_position_embeddings); choose at most that"
        )


def max_positions(model: PreTrainedModel) -> float:
    """Return the longest sequence that the model supports.

    Linear and dynamic rope scaling stretch `max_position_embeddings`; with yarn and llama3 the
    config states the stretched number.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or float("inf")
    rope = getattr(model.config, "rope_parameters", None) or {}
    factor = rope.get("factor") if rope.get("rope_type") in ("linear", "dynamic") else None
    stretched: float = limit * max(1, factor or 1)
    return stretched
