"""Read a .pt file of somebody's: dense tensors alone, and no code of its own runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from torch import Tensor

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import check_file

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path, what: str) -> Any:
    """What `torch.save` wrote, on the CPU; pages are read when they are used.

    Args:
        what: What the file should hold, in words.

    Raises:
        InputError: No regular file, a damaged one, or one that holds more than tensors.
    """
    check_file(path, f"a torch file with {what}")
    try:
        # torch's older format cannot be mapped.
        mmap = is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch advises, a user of the file cannot do
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds; their advice is to run the file
        kinds = (RuntimeError, OSError, EOFError, BadZipFile, ValueError, KeyError, MemoryError)
        if isinstance(error, kinds) and "TorchScript" not in str(error):
            raise InputError(
                f"{path}: not a readable torch file ({reason_of(error)}); expected {what}"
            ) from error
        raise InputError(f"{path}: holds more than tensors; expected {what}") from error


def oddity(value: object) -> str | None:
    """What a value is instead of a dense float tensor whose elements all lie in its file; None
    where it is one."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_nested:
        return f"a tensor of the layout {value.layout}"
    if value.device.type != "cpu":
        return f"a tensor without values (device {value.device})"
    if value.is_quantized or value.dtype not in DTYPES:
        return f"a tensor of {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "a view that repeats its values"
    return None
