"""Read and write `.pt` and `.bin` files of torch, without running any code that a file names."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from torch import Tensor

from sparsecast.core.disk import full_disk_errno
from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import check_file, hidden_sibling
from sparsecast.core.pickle_claims import Claim, check_claims

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_torch(value: Any, path: Path) -> None:
    """Call `torch.save` and rename the file into place; a failure leaves the old file untouched.

    The new file is on the disk before the old one goes, so that a power cut leaves one of them.

    Raises:
        OSError: The disk is full. torch hides the system's error code, which is restored here.
    """
    part = hidden_sibling(path, "part")
    try:
        with part.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:
        if (code := full_disk_errno(error)) is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def load_torch(path: Path, expected: str, advice: str, *, tensors: bool = True) -> Any:
    """Load a `torch.save` file of tensors onto the CPU.

    Files in torch's zip format are memory-mapped: a page is read when it is used. Files that
    torch wrote before version 1.6 are read whole.

    Args:
        expected: What the file should be, for the message about a missing file.
        advice: What the user can do, for the message about an unusable file.
        tensors: Whether the file holds tensors alone, so that no number in it exceeds its bytes.

    Raises:
        InputError: The file is missing, damaged, or holds more than tensors.
    """
    check_file(path, expected)
    zipped = _is_zip(path)
    try:
        if tensors:
            check_claims(path, zipped)
    except Claim as error:
        raise InputError(f"{path}: not a file of tensors: {error}; {advice}") from None
    except (OSError, ValueError):
        pass  # an empty file, or one that torch says more about
    try:
        with warnings.catch_warnings(action="ignore"):  # advice that a reader cannot follow
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        # torch's own text advises weights_only=False, which would run code from the file.
        text = str(error)
        foreign = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", text)
        if foreign:
            raise InputError(
                f"{path}: holds more than tensors ({foreign[1] or foreign[2]}), and no code from "
                f"a file is run; {advice}"
            ) from None
        damaged = "weights_only" in text
        reason = "it is not a file of torch.save" if damaged else reason_of(error).split(". ")[0]
        if not tensors:  # a file of ours
            raise InputError(f"{path}: damaged, expected {expected}; {advice}") from None
        raise InputError(f"{path}: not a readable torch file ({reason}); {advice}") from None


def _is_zip(path: Path) -> bool:
    try:
        return is_zipfile(path)
    except BadZipFile:  # one that goes on in another file; torch refuses it
        return True


def load_state(path: Path, *names: str) -> dict[str, Any]:
    """Load what an unfinished run has kept, as `load_torch` does.

    Raises:
        InputError: It is cut short or damaged, or has no entries of these names.
    """
    advice = "remove it, and the same command goes on from what was finished before"
    found = load_torch(path, "the state of an unfinished run", advice, tensors=False)
    absent = [name for name in names if not isinstance(found, dict) or name not in found]
    if absent:
        raise InputError(f"{path}: damaged, it holds no {absent[0]}; {advice}")
    kept: dict[str, Any] = found
    return kept


def describe_unless_dense(value: object) -> str | None:
    """Describe a value that is not a dense CPU tensor; None for a dense tensor of any dtype."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_nested:
        return f"a tensor of the layout {value.layout}"
    if value.device.type != "cpu":
        return f"a tensor without values (device {value.device})"
    if value.is_quantized:
        return f"a tensor of {value.dtype}"
    return None


def describe_unless_floats(value: object) -> str | None:
    """Describe a value that is not a dense float tensor; None if every element is in the file."""
    if (found := describe_unless_dense(value)) is not None:
        return found
    assert isinstance(value, Tensor)
    if value.dtype not in FLOATS:
        return f"a tensor of {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "a view that repeats its values"
    return None
