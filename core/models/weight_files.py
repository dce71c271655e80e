"""Find a model's weight files as transformers does, and read tensors from them.

transformers takes the first of these that exists and never looks at the others:

    model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json

Everything here reads that one, so what is recorded is what is exported. Nothing is unpickled but
tensors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsecast.core.errors import InputError, reason_of, shown
from sparsecast.core.files import check_file, read_json, unreadable_error
from sparsecast.core.options import short_repr
from sparsecast.core.torch_files import describe_unless_dense, load_torch

ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for, first come first."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_BIN = re.compile(r"pytorch_model.*\.bin")
_AGAIN = "download or save the weights again"
_POINTER = b"version https://git-lfs.github.com/spec/v1"


def main_file(folder: Path) -> Path:
    """Return the weights file, or the shards' index, that transformers reads in a folder.

    Raises:
        InputError: None of `ORDER`, one that may not be read, or a distributed checkpoint, which
            transformers prefers to all of them.
    """
    for name in _names(folder):
        if _DISTRIBUTED.fullmatch(name):
            raise InputError(
                f"{folder / name}: is a distributed checkpoint, which transformers reads instead "
                "of model.safetensors; load it and save it with `model.save_pretrained(folder)`"
            )
    paths = [folder / name for name in ORDER]
    for path in paths:
        if os.path.isfile(path):  # false also for a FIFO, and where a link leads nowhere
            return path
    for path in paths:
        if os.path.lexists(path):
            check_file(path, "a model's weights")
    raise InputError(
        f"{folder}: no model.safetensors, pytorch_model.bin or index of shards; save the "
        "weights with `model.save_pretrained(folder)` of transformers 5"
    )


def has_weights(folder: Path) -> bool:
    """Return whether a model's folder holds weights, not only a config and an index of them."""
    return any(name.endswith(".safetensors") or _BIN.fullmatch(name) for name in _names(folder))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Map every tensor's name to its file, by the files' own headers.

    Raises:
        InputError: See `main_file`; an index that names files of other folders, files that are not
            there, or tensors that are not in them; a tensor that two shards hold.
    """
    main = main_file(folder)
    index = _index(main) if main.suffix == ".json" else {}
    where: dict[str, Path] = {}
    for file in sorted(set(index.values())) or [main.name]:
        path = folder / file
        with open_weights(path) as opened:
            for name in opened.keys():  # noqa: SIM118
                if name in where:
                    raise InputError(
                        f"{path}: tensor {shown(name)} is also in {where[name].name}, expected it "
                        f"once; {_AGAIN}"
                    )
                where[name] = path
    for name, file in sorted(index.items()):
        if where.get(name) != folder / file:
            raise InputError(
                f"{folder / file}: tensor {shown(name)} is not in it, but the index says so; "
                f"{_AGAIN}"
            )
    return where


def _index(path: Path) -> dict[str, str]:
    """Read a shard index: names of tensors to names of files beside it."""
    refuse_lfs_pointer(path)
    index = read_json(path, "the index of a sharded model").get("weight_map")
    if (
        not isinstance(index, dict)
        or not index
        or not all(isinstance(file, str) for file in index.values())
    ):
        raise InputError(
            f"{path}: expected an object of tensor names and files under 'weight_map'"
            "; download it again"
        )
    suffix = ".safetensors" if ".safetensors" in path.name else ".bin"
    there = _names(path.parent)
    for file in sorted(set(index.values())):
        if re.search(r"[/\\\0]", file) or not file.endswith(suffix):
            raise InputError(
                f"{path}: names the file {short_repr(file)}, expected the name of a *{suffix} file "
                "beside it, without a folder; give an index that save_pretrained has written"
            )
        if file not in there:
            raise InputError(
                f"{path.parent / shown(file)}: no such file, but {path.name} names it; {_AGAIN}"
            )
    return index


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(
            f"{folder}: may not be listed ({error.strerror or error}), expected a model's folder"
        ) from error


def open_weights(path: Path) -> Any:
    """Open a weights file with the interface of `safe_open`: `keys`, `get_tensor`, `with`.

    Memory: a map of the file; of a .bin that torch wrote before 1.6, all of it.
    """
    check_file(path, "a model's weights")
    refuse_lfs_pointer(path)
    if path.suffix == ".bin":
        return _Pickled(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a readable weights file ({reason_of(error)}); {_AGAIN}"
        ) from error


def refuse_lfs_pointers(folder: Path) -> None:
    """Refuse Git LFS pointers among the small files: configs, tokenizer, templates."""
    for name in _names(folder):
        if name.endswith((".json", ".model", ".txt", ".jinja")) and name not in ORDER:
            refuse_lfs_pointer(folder / name)


def refuse_lfs_pointer(path: Path) -> None:
    """Raise `InputError` if `path` is a Git LFS pointer instead of the file."""
    if not os.path.isfile(path):
        return
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise unreadable_error(path, error, "a model's file") from error
    if head.startswith(_POINTER):
        size = re.search(rb"^size (\d{1,18})\s*$", head, re.M)
        real = f" of {int(size[1]):,} bytes" if size else ""
        raise InputError(
            f"{path}: is a Git LFS pointer, expected the file{real} itself; run `git lfs pull` in "
            "that folder, or download the model with `hf download`"
        )


class _Pickled:
    """A .bin file with the reading methods of `safe_open`."""

    def __init__(self, path: Path) -> None:
        value = load_torch(path, "a model's weights", f"give model.safetensors, or {_AGAIN}")
        if not isinstance(value, dict) or not all(
            isinstance(name, str) and name.isprintable() and describe_unless_dense(tensor) is None
            for name, tensor in value.items()
        ):
            raise InputError(
                f"{path}: it does not hold a dict of tensors, as `torch.save(model.state_dict(), "
                f"file)` writes it; {_AGAIN}"
            )
        self._tensors: dict[str, Tensor] = value

    def __enter__(self) -> _Pickled:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: a memory map lives as long as its tensors."""

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()
