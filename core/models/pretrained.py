"""The only calls of transformers' loaders; a model's own code is never run or asked about.

Left to itself transformers runs the Python files that `auto_map` names once somebody has typed "y",
and reads that answer from standard input. Here `trust_remote_code` is always false, the network is
never asked, and configs lose what would name code or other files to load.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import read_json

CODE = ("auto_map", "custom_pipelines", "configuration_files", "fusion_config")
"""Fields that name code, kernels or other files to load; models are the same without them."""
_KERNELS = ("attn_implementation", "experts_implementation")


def without_code(raw: dict[str, Any]) -> dict[str, Any]:
    """Remove `CODE` and kernels from the hub from config.json's fields."""
    return {
        key: value
        for key, value in raw.items()
        if key not in CODE and not key.lstrip("_").startswith(_KERNELS)
    }


def build_config(raw: dict[str, Any]) -> PreTrainedConfig:
    """Build a config from config.json's fields, of a `model_type` that transformers knows."""
    kind = CONFIG_MAPPING[raw["model_type"]]
    config: PreTrainedConfig = kind.from_dict(without_code(raw))
    return config


def load_pretrained(
    folder: Path,
    config: PreTrainedConfig,
    *,
    safetensors: bool,
    dtype: torch.dtype,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' model of a folder and what it says of tensors that were missing or left over.

    Args:
        safetensors: Which of the formats to read; see `weights.main_file`.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=safetensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}: transformers cannot load the model ({reason_of(error)}); check "
            "config.json and generation_config.json"
        ) from error
    return loaded[0], loaded[1]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the causal LM of a config on the meta device: names and shapes, no values."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    return cast(PreTrainedModel, model)


def random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build the causal LM of a config with random weights."""
    with device:
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=False
        )
    return cast(PreTrainedModel, model)


def load_pretrained_tokenizer(folder: Path, kind: Any = AutoTokenizer) -> Any:
    """transformers' tokenizer of a folder: of the class `kind`, or of the one that its files name.

    Raises whatever transformers meets in the files; `load_tokenizer` says it in one line.
    """
    path = folder / "tokenizer_config.json"
    if kind is AutoTokenizer and path.is_file() and "auto_map" in read_json(path, "a tokenizer's"):
        # The class that it names is code; tokenizer.json is the whole tokenizer without it.
        kind = PreTrainedTokenizerFast
    # Of older names in config.json, which are not the user's.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
