"""Check what lies beside the file: the activation counts and the card."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file
from sparsecast.core.torch_files import describe_unless_floats, load_torch
from sparsecast.export.checks.base import Check
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile


def check_activation_folder(file: GGUFFile, folder: Path) -> Check:
    """Check activation_<i>.pt of every layer: counts, (F,) float32 or float64."""
    if not os.path.lexists(folder):
        return Check("hot and cold", True, "no activation folder: exported without activations")
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        detail = f"{folder}: expected a folder with the activation counts ({error.strerror})"
        return Check("hot and cold", False, detail)
    wrong = []
    header = header_of(file)
    names = [f"activation_{i}.pt" for i in range(header.layers)]
    if unmatched := set(names) ^ there:
        wrong.append(f"{', '.join(sorted(unmatched))} missing or not expected")
    for name in names:
        if name not in there:
            continue
        try:
            read_counts(folder / name, header.ffn)
        except InputError as error:
            wrong.append(str(error).removeprefix(f"{folder}{os.sep}"))
    return Check("hot and cold", not wrong, "; ".join(wrong) or f"{header.layers} files")


def check_card(folder: Path) -> list[Check]:
    """Return a failed check if README.md is there but not a file, none otherwise."""
    path = folder / "README.md"
    if not os.path.lexists(path):
        return []
    try:
        check_file(path, "the bundle's card")
    except InputError as error:
        return [Check("card", False, str(error))]
    return []


def read_all_counts(file: GGUFFile) -> list[Tensor] | None:
    """Read the counts beside a file, per layer as `read_counts`; None where it has none.

    Raises:
        InputError: See `read_counts`.
    """
    folder, header = file.path.parent / "activation", header_of(file)
    if not folder.is_dir():
        return None
    paths = (folder / f"activation_{i}.pt" for i in range(header.layers))
    return [read_counts(path, header.ffn) for path in paths]


def read_counts(path: Path, width: int) -> Tensor:
    """Read how often each neuron of a layer fired, (F,) float32 or float64.

    Raises:
        InputError: The file is damaged, or holds something else.
    """
    expected = f"a tensor of {width} counts"
    counts = load_torch(path, f"a torch file with {expected}", f"expected {expected}")
    reason = describe_unless_floats(counts)
    if reason is not None or counts.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{path}: is not a float32 or float64 tensor ({reason or counts.dtype})")
    if counts.shape != (width,):
        raise InputError(f"{path}: has shape {tuple(counts.shape)}, expected ({width},)")
    if not bool((counts >= 0).all()) or not bool(counts.isfinite().all()):
        raise InputError(f"{path}: holds values that are not counts")
    kept: Tensor = counts.detach()
    return kept
