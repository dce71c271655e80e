"""A model's folder read tensor by tensor, without building the model.

Memory: one tensor at a time; the files are memory maps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from sparsecast.collect.atomic import read_json
from sparsecast.collect.errors import InputError
from sparsecast.collect.families import unknown
from sparsecast.collect.remap import REMAPPED


def resolve(source: str) -> Path:
    """The local folder of a model: `source` itself, or the snapshot of a Hugging Face id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{source}: no config.json in this folder, expected a model as "
                "save_pretrained writes it; give its folder or a Hugging Face id"
            )
        return folder
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "~")):
        raise InputError(
            f"{source}: no such model folder; give a folder with config.json and weights, "
            "or a Hugging Face id such as SparseLLM/prosparse-llama-2-7b"
        )
    try:
        return Path(snapshot_download(source, allow_patterns=_wanted(source)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{source}: neither a local folder nor a model that could be downloaded ({reason}); "
            "check the spelling, the network and `hf auth login`"
        ) from error


def _wanted(source: str) -> list[str]:
    """Everything but weights in formats that are not read, so that none is downloaded twice."""
    files = HfApi().list_repo_files(source)
    safe = any(file.endswith(".safetensors") for file in files)
    weights = "*.safetensors" if safe else "pytorch_model*.bin"
    return ["*.json", weights, "*.model", "*.txt", "*.jinja"]


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Checkpoint:
    """Config and lazily read tensors of a model's folder: safetensors or .bin, sharded or not."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.folder = resolve(source)
        self.config = read_config(self.folder)

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        for stem in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{stem}.index.json"
            if index.is_file():
                weight_map = read_json(index, "the index of a sharded model").get("weight_map")
                if not isinstance(weight_map, dict) or not all(
                    isinstance(file, str) for file in weight_map.values()
                ):
                    raise InputError(
                        f"{index}: expected an object of tensor names and files under 'weight_map'"
                        "; download it again"
                    )
                return {name: self.folder / file for name, file in weight_map.items()}
            single = self.folder / stem
            if single.is_file():
                with _open(single) as file:
                    return dict.fromkeys(file.keys(), single)
        raise InputError(
            f"{self.folder}: no model.safetensors, pytorch_model.bin or index of shards; save the "
            "weights with `model.save_pretrained(folder)` of transformers 5"
        )

    def check(self) -> None:
        """Open every file once, so that a missing or damaged one is named before work starts.

        Raises:
            InputError: That, or weights that are quantised and would be taken for plain numbers.
        """
        if (found := getattr(self.config, "quantization_config", None)) is not None:
            kind = found.get("quant_method", "unnamed") if isinstance(found, dict) else found
            raise InputError(
                f"{self.folder}: its weights are quantised ({kind}), expected float32, float16 or "
                "bfloat16; give the model they were made from"
            )
        for path in sorted(set(self._file_of.values())):
            with _open(path) as file:
                names = set(file.keys())
                for name in (name for name, where in self._file_of.items() if where == path):
                    if name not in names:
                        raise InputError(
                            f"{path}: tensor {name} is not in it, but the index says so; download "
                            "or save the weights again"
                        )
                    dtype = file.get_tensor(name).dtype
                    if name.endswith(".weight") and dtype not in FLOATS:
                        raise InputError(
                            f"{path}: tensor {name} is {str(dtype).removeprefix('torch.')}, "
                            "expected float32, float16 or bfloat16; give the model that the "
                            "quantised one was made from"
                        )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def stored_name(self, name: str) -> str:
        """The checkpoint's own spelling of a causal LM's tensor: files that were saved from the
        model without its head leave out the first part (OPT's decoder.layers.0...)."""
        short = name.partition(".")[2]
        return short if name not in self and short in self else name

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype, on the CPU; pages are read when it is used."""
        name = self.stored_name(name)
        if name not in self._file_of:
            raise InputError(
                f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete or is not "
                f"a {self.config.model_type} causal LM"
            )
        with _open(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, one at a time, each file opened once."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(_open(path)) for path in set(self._file_of.values())}
            for name, path in sorted(self._file_of.items()):
                yield name, files[path].get_tensor(name)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell this model's weights from any other's.

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


def effective(config: PreTrainedConfig) -> dict[str, Any]:
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
    "activation",
    "activation_function",
}


def read_config(folder: Path) -> PreTrainedConfig:
    """The config in a folder, without remote code; see remap.py for what stands in for it."""
    path = folder / "config.json"
    raw = read_json(path, "the config of a causal language model")
    kind = raw.get("model_type")
    try:
        if kind in REMAPPED:
            return REMAPPED[kind](raw, str(folder))
        if kind is not None and kind not in CONFIG_MAPPING:
            raise InputError(unknown(kind, str(folder)))
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        return config
    except InputError:
        raise
    except Exception as error:  # config classes check their fields, each in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: transformers cannot read it ({reason}); expected the config of a causal "
            "language model"
        ) from error


class _Pickled:
    """A .bin file with the reading methods of `safe_open`; tensors are views of a memory map."""

    def __init__(self, path: Path) -> None:
        value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(value, dict) or not all(isinstance(t, Tensor) for t in value.values()):
            raise RuntimeError("it does not hold a dict of tensors")
        self._tensors: dict[str, Tensor] = value

    def __enter__(self) -> _Pickled:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _open(path: Path) -> Any:
    try:
        return _Pickled(path) if path.suffix == ".bin" else safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: not a readable weights file ({reason}); download or save it again"
        ) from error
