"""Read a model's folder tensor by tensor, without building the model.

Memory: one tensor at a time; the files are memory maps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import read_json, unreadable_error
from sparsecast.core.folders import check_folder_kind
from sparsecast.core.models.bitnet import check_quantization
from sparsecast.core.models.config_checks import check_fields, check_pad_token, check_shapes
from sparsecast.core.models.families import unknown_family_message
from sparsecast.core.models.location import resolve_model
from sparsecast.core.models.pretrained import build_config, without_code
from sparsecast.core.models.remote_configs import REMAPPED, model_type_of
from sparsecast.core.models.weight_files import (
    has_weights,
    main_file,
    open_weights,
    refuse_lfs_pointer,
    refuse_lfs_pointers,
    tensor_files,
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Checkpoint:
    """Config and lazily read tensors of a model's folder: safetensors or .bin, sharded or not."""

    def __init__(self, source: str) -> None:
        """
        Raises:
            InputError: No such model, an adapter beside its weights, or an unusable config.
        """
        self.source = source
        self.folder = resolve_model(source)
        _refuse_adapter(self.folder)
        self.config = read_config(self.folder)
        self._pickled: tuple[Path, Any] | None = None

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        return tensor_files(self.folder)

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors; none in a folder without weights."""
        return sorted(set(self._file_of.values())) if has_weights(self.folder) else []

    @property
    def raw_config(self) -> dict[str, Any]:
        """Read config.json as it is, before a class stands in for the model's own."""
        return read_json(self.folder / "config.json", "the config of a causal language model")

    @property
    def safetensors(self) -> bool:
        """Return whether the weights are safetensors rather than .bin."""
        return ".safetensors" in main_file(self.folder).name

    def check(self) -> None:
        """Open every file once, so that a missing or damaged file is reported before work starts.

        Raises:
            InputError: A file is missing or damaged; weights are quantized or do not belong to the
                model of the config; the padding token has no row in the embedding.
        """
        check_quantization(self.config, self.folder)
        refuse_lfs_pointers(self.folder)
        check_pad_token(self.config, self.folder)
        shapes = {}
        for path in sorted(set(self._file_of.values())):
            with self._open(path) as file:
                for name in (name for name, where in self._file_of.items() if where == path):
                    tensor = file.get_tensor(name)
                    shapes[name] = tuple(tensor.shape)
                    if name.endswith(".weight") and tensor.dtype not in FLOATS:
                        raise InputError(
                            f"{path}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, "
                            "expected float32, float16 or bfloat16; give the model that the "
                            "quantized one was made from"
                        )
        check_shapes(self.config, shapes, self.folder)

    def _open(self, path: Path) -> Any:
        """Keep the last .bin file open: opening torch's older format reads the whole file."""
        if path.suffix != ".bin":
            return open_weights(path)
        if self._pickled is None or self._pickled[0] != path:
            self._pickled = path, open_weights(path)
        return self._pickled[1]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def stored_name(self, name: str) -> str:
        """The checkpoint's own spelling of a causal LM's tensor: files that were saved from the
        model without its head leave out the first part (OPT's decoder.layers.0...)."""
        short = name.partition(".")[2]
        return short if name not in self and short in self else name

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype on the CPU; its pages are read on first use."""
        name = self.stored_name(name)
        if name not in self._file_of:
            raise InputError(
                f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete or is not "
                f"a {self.config.model_type} causal LM"
            )
        with self._open(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors with their names, one at a time; each file is opened once."""
        with ExitStack() as stack:
            paths = set(self._file_of.values())
            files = {path: stack.enter_context(open_weights(path)) for path in paths}
            for name, path in sorted(self._file_of.items()):
                yield name, files[path].get_tensor(name)

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits that identify this model's weights.

        Hashes every tensor's name, shape and, as float32, 64 values spread over it: milliseconds
        for a file of any size, and the same for a file stored again in other shards.
        """
        digest = blake2b(digest_size=8)
        for name, tensor in self.tensors():
            flat = tensor.reshape(-1)
            count = min(64, flat.numel())
            where = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(flat[where].float().numpy().tobytes())
        return digest.hexdigest()


def check_tied_head(checkpoint: Checkpoint, output: Tensor, embedding: str) -> None:
    """Refuse a tied config beside an output matrix that differs from the embedding.

    transformers runs such a model untied, with a warning.
    """
    shared = checkpoint.tensor(embedding)
    if not torch.equal(output.to(shared.dtype), shared):
        raise InputError(
            f"{checkpoint.folder}: lm_head.weight is not {embedding}, but config.json ties the two "
            "(tie_word_embeddings, the default of falcon, opt and minicpm); set it to false there, "
            "or remove lm_head.weight"
        )


def result_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a config decides the numbers, as JSON has it: without names, versions and dtype, and
    without the activation, which is its own entry wherever this is compared."""
    value: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: field for name, field in sorted(value.items()) if name not in _INDIFFERENT}


_INDIFFERENT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "hidden_act",
    "hidden_act_param",
    "hidden_activation",
    "activation",
    "activation_function",
}


def read_config(folder: Path) -> PreTrainedConfig:
    """Read a folder's config without remote code; remote_configs.py lists the substitutes.

    Raises:
        InputError: No config.json, fields that make no sense, or a family without a class.
    """
    path = folder / "config.json"
    try:
        path.lstat()
    except FileNotFoundError as error:
        check_folder_kind(folder, "model")
        raise InputError(
            f"{folder}: no config.json in this folder, expected a model as save_pretrained writes "
            "it; give its folder or a Hugging Face id"
        ) from error
    except OSError as error:
        raise unreadable_error(path, error, "the config of a causal language model") from error
    refuse_lfs_pointer(path)
    raw = read_json(path, "the config of a causal language model")
    check_fields(raw, path)
    if (kind := model_type_of(raw)) is None:
        check_folder_kind(folder, "model")
    if not isinstance(kind, str) or (kind not in REMAPPED and kind not in CONFIG_MAPPING):
        raise InputError(unknown_family_message(kind, str(folder), brings_code="auto_map" in raw))
    raw = without_code(raw | {"model_type": kind})
    try:
        config = REMAPPED[kind](raw, str(folder)) if kind in REMAPPED else build_config(raw)
    except InputError:
        raise
    except Exception as error:  # config classes check their fields, each in its own way
        raise InputError(
            f"{path}: transformers cannot read it ({reason_of(error)}); expected the config of a "
            "causal language model"
        ) from error
    config.name_or_path = str(folder)
    return config


def _refuse_adapter(folder: Path) -> None:
    """Refuse adapters: transformers applies them only if peft is installed, export never does."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if os.path.exists(folder / name):  # false in a folder that may not be searched
            raise InputError(
                f"{folder}: holds an adapter ({name}), which is not applied; merge it into the "
                "weights with peft's `PeftModel.from_pretrained(base, folder).merge_and_unload()"
                ".save_pretrained(merged)` and give that folder, or move the adapter's files away"
            )
