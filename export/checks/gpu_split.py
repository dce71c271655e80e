"""Check a bundle's gpuidx file: order, types, bytes, and that its neurons are the hottest.

Written from PowerInfer's loader (llama.cpp at d3ebd7c, `llama_gpu_split_loader`), without the
exporter's code. A split is best if exchanging a layer's coldest chosen block for another layer's
hottest remaining one never raises the total: within a layer blocks get colder, so such exchanges
lead to every other split of the same size.

Shape letters: F FFN width, K neurons on the GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.core.errors import InputError, shown
from sparsecast.export.checks.base import Check
from sparsecast.export.checks.folders import read_counts
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import STRING, UINT32, UINT64, GGUFFile

REQUIRED = {
    "general.architecture": STRING,
    "generic.gpu_index.block_count": UINT32,
    "split.vram_capacity": UINT64,
}


class Edge(NamedTuple):
    """Sums of counts of the blocks of 256 on both sides of a layer's split."""

    layer: int
    last: float
    """The coldest block on the GPU; infinite if there is none."""
    next: float
    """The hottest block on the CPU; -1 if there is none."""


def check_gpu_split(file: GGUFFile, folder: Path) -> list[Check]:
    """Return one check if the bundle has a split, none otherwise."""
    path = folder / f"{file.path.name}.generated.gpuidx"
    others = sorted(p.name for p in folder.glob("*.gpuidx") if p != path)
    if others:
        detail = f"{', '.join(others)}: PowerInfer reads only {path.name}"
        return [Check("gpu split", False, detail)]
    if not os.path.lexists(path):
        return []
    try:
        split = GGUFFile(path)
    except InputError as error:
        return [Check("gpu split", False, str(error))]
    for look in (_header, _tensors, _lists, _bytes):
        if wrong := look(split, file):
            return [Check("gpu split", False, "; ".join(wrong))]
    return [_best(split, file, folder / "activation")]


def _header(split: GGUFFile, file: GGUFFile) -> list[str]:
    wrong = [] if split.magic == b"PWRI" else [f"magic is {split.magic!r}, expected b'PWRI'"]
    for key, kind in REQUIRED.items():
        found = split.key_types.get(key)
        if found != kind:
            wrong.append(f"{key} is missing" if found is None else f"{key} has value type {found}")
    if wrong:
        return wrong
    want = {
        "general.architecture": "generic.gpu_index",
        "generic.gpu_index.block_count": header_of(file).layers,
    }
    return [
        f"{key} is {split.keys[key]!r}, expected {value!r}"
        for key, value in want.items()
        if split.keys[key] != value
    ]


def _tensors(split: GGUFFile, file: GGUFFile) -> list[str]:
    header = header_of(file)
    layers, width = header.layers, header.ffn
    want = [f"blk.{i}.gpu_{name}" for i in range(layers) for name in ("idx", "bucket")]
    there = list(split.entries)
    if len(there) != len(want):
        return [f"holds {len(there)} tensors, expected {len(want)}"]
    for name, expected in zip(there, want, strict=True):
        if name != expected:
            return [f"{shown(name)} is at the place of {expected}"]
    wrong = []
    for name, entry in split.entries.items():
        if entry.type.name != "i32":
            wrong.append(f"{name} is {entry.type.name}, expected i32")
        if len(entry.shape) != 1 or (name.endswith("idx") and entry.shape != (width,)):
            wrong.append(f"{name} is {entry.shape}, expected ({width},)")
    return wrong


def _lists(split: GGUFFile, file: GGUFFile) -> list[str]:
    wrong = []
    for i in range(header_of(file).layers):
        index_F, bucket_K = (split.tensor(f"blk.{i}.gpu_{name}") for name in ("idx", "bucket"))
        if not bool(((index_F == 0) | (index_F == 1)).all()):
            wrong.append(f"blk.{i}.gpu_idx holds values that are not 0 or 1")
        elif not torch.equal(index_F.nonzero().flatten(), bucket_K.long()):
            wrong.append(f"blk.{i}.gpu_bucket is not where blk.{i}.gpu_idx is 1, in order")
        elif len(bucket_K) % 256:
            wrong.append(f"layer {i} has {len(bucket_K)} neurons, not a multiple of 256")
    return wrong


def _bytes(split: GGUFFile, file: GGUFFile) -> list[str]:
    """Compare the bytes of the split with split.vram_capacity.

    A neuron takes its rows of the FFN's matrices; a layer that is not whole on the GPU also takes
    the list of its neurons.
    """
    header, need = header_of(file), 0
    matrices = ("gate", "up", "down_t") if header.gated else ("up", "down_t")
    for i in range(header.layers):
        bucket = split.entries[f"blk.{i}.gpu_bucket"]
        neurons = bucket.shape[0]
        need += bucket.nbytes if neurons < header.ffn else 0
        for name in matrices:
            matrix = file.entries[f"blk.{i}.ffn_{name}.weight"]
            need += neurons * (matrix.nbytes // matrix.shape[0])
    capacity = split.keys["split.vram_capacity"]
    if need <= capacity:
        return []
    return [f"its neurons take {need:,} bytes, but split.vram_capacity is {capacity:,}"]


def _best(split: GGUFFile, file: GGUFFile, folder: Path) -> Check:
    layers = header_of(file).layers
    buckets = [split.tensor(f"blk.{i}.gpu_bucket").long() for i in range(layers)]
    total = sum(len(bucket_K) for bucket_K in buckets)
    if not folder.is_dir():
        return Check("gpu split", True, f"{total:,} neurons; no activation folder to compare with")
    edges = []
    for i, bucket_K in enumerate(buckets):
        try:
            count_F = read_counts(folder / f"activation_{i}.pt", header_of(file).ffn).double()
        except InputError as error:
            return Check("gpu split", False, str(error))
        if bool(count_F[bucket_K].sum() < count_F.topk(len(bucket_K)).values.sum()):
            return Check(
                "gpu split", False, f"layer {i}: not its {len(bucket_K):,} hottest neurons"
            )
        edges.append(_edge(i, count_F, len(bucket_K)))
    lost, kept = max(edges, key=lambda e: e.next), min(edges, key=lambda e: e.last)
    if lost.next > kept.last:
        detail = (
            f"layer {lost.layer}'s next 256 neurons fired {lost.next:,.0f} times, the last 256 of "
            f"layer {kept.layer} {kept.last:,.0f}: another split of this size has a greater total"
        )
        return Check("gpu split", False, detail)
    return Check("gpu split", True, f"{total:,} neurons, the hottest of {layers} layers")


def _edge(layer: int, count_F: Tensor, k: int) -> Edge:
    ordered_F = count_F.sort(descending=True).values
    last = ordered_F[k - 256 : k].sum().item() if k else float("inf")
    following = ordered_F[k : k + 256].sum().item() if k < len(ordered_F) else -1.0
    return Edge(layer, last, following)
