"""ACTS: recorded activations on disk.

    manifest.json               what was recorded, from which model and text, and the real counts
    <split>-<nnnnn>.safetensors one shard: `position` (T,) int32, the token's place in its
                                document, and per layer `layer.<i>.x` (T, D) f16 or bf16 and
                                `layer.<i>.mask` (T, ceil(F / 8)) uint8, see bits.py
    stats.safetensors           `layer.<i>.fired` (F,) int64, firing count over every token

2 D + F / 8 bytes per token and layer, and 4 bytes per token.

Shape letters: T tokens, D hidden, F FFN width, P packed width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsecast.collect.atomic import read_json, write_json
from sparsecast.collect.bits import pack
from sparsecast.collect.errors import InputError
from sparsecast.collect.recorder import LayerRecord
from sparsecast.collect.splits import SPLITS

FORMAT_VERSION = 1
SHARD_BYTES = 128 * 2**20
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an activation store holds; `options` are those of the command that made it."""

    model: str
    fingerprint: str
    """Of the model's weights, see `Checkpoint.fingerprint`."""
    model_type: str
    convention: str
    """Where the predictor's input was taken."""
    activation: str
    activation_threshold: float
    corpus: str
    options: dict[str, Any]
    layers: list[int]
    hidden_size: int
    ffn_width: int
    ffn_matrices: int
    """3 gated, 2 not: m in the traffic formulas."""
    x_dtype: str
    shard_tokens: dict[str, list[int]]
    """Per split, the number of tokens of each shard."""
    documents: dict[str, int]
    format_version: int = FORMAT_VERSION

    def tokens(self, split: str | None = None) -> int:
        splits = SPLITS if split is None else (split,)
        return sum(sum(self.shard_tokens.get(name, [])) for name in splits)


class Rows(NamedTuple):
    """A run of consecutive tokens of one layer; views of a memory map."""

    x_TD: Tensor
    mask_TP: Tensor


class Writer:
    """Collects records into shards below `SHARD_BYTES`.

    Memory: one shard per split being filled, so at most 3 * `SHARD_BYTES` and one batch.
    """

    def __init__(self, folder: Path, layers: list[int], x_dtype: torch.dtype) -> None:
        self._folder = folder
        self._layers = layers
        self._x_dtype = x_dtype
        self._parts: dict[str, dict[str, list[Tensor]]] = {}
        self._bytes: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self._split = SPLITS[0]
        self.shard_tokens: dict[str, list[int]] = {name: [] for name in SPLITS}
        self.fired: dict[int, Tensor] = {}

    def begin(self, split: str, position_T: Tensor) -> None:
        """Name the split and the token positions of the records that follow."""
        if self._bytes[split] >= SHARD_BYTES:
            self._flush(split)
        self._split = split
        self._append("position", position_T.to(torch.int32))

    def add(self, record: LayerRecord) -> None:
        """Store one layer of one batch and count what fired."""
        mask_TF = record.x1_TF != 0
        counts = mask_TF.sum(0).cpu()
        self.fired[record.layer] = self.fired.get(record.layer, 0) + counts
        stored = record.x_TD.to(self._x_dtype)
        if not bool(stored.isfinite().all()):
            raise InputError(
                f"layer {record.layer}: a predictor input of magnitude "
                f"{record.x_TD.abs().max().item():.3g} does not fit {self._x_dtype}; "
                "collect with --dtype bfloat16, which stores bf16"
            )
        self._append(f"layer.{record.layer}.x", stored)
        self._append(f"layer.{record.layer}.mask", pack(mask_TF))

    def close(self) -> None:
        """Write what is left and the statistics."""
        for split in list(self._parts):
            self._flush(split)
        stats = {f"layer.{i}.fired": count for i, count in sorted(self.fired.items())}
        save_file(stats, self._folder / "stats.safetensors")

    def _append(self, name: str, value: Tensor) -> None:
        value = value.cpu()
        self._parts.setdefault(self._split, {}).setdefault(name, []).append(value)
        self._bytes[self._split] += value.nbytes

    def _flush(self, split: str) -> None:
        tensors = {name: torch.cat(parts) for name, parts in self._parts.pop(split).items()}
        number = len(self.shard_tokens[split])
        save_file(tensors, self._folder / _shard_name(split, number))
        self.shard_tokens[split].append(len(tensors["position"]))
        self._bytes[split] = 0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, asdict(manifest))


class ActivationStore:
    """Read access, per layer and by runs of tokens, through memory maps."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        value = read_json(self.folder / MANIFEST, "the manifest of a `sparsecast collect` folder")
        known = {field.name for field in fields(Manifest)}
        if value.get("format_version") != FORMAT_VERSION or set(value) != known:
            raise InputError(
                f"{self.folder / MANIFEST}: format version {value.get('format_version')}, expected "
                f"an activation store of version {FORMAT_VERSION}; collect again"
            )
        self.manifest = Manifest(**value)
        self._shard = lru_cache(maxsize=None)(self._open_shard)

    def shards(self, split: str) -> list[int]:
        """Tokens per shard of a split."""
        return self.manifest.shard_tokens.get(split, [])

    def rows(
        self, split: str, shard: int, layer: int, start: int = 0, stop: int | None = None
    ) -> Rows:
        """Tokens [start, stop) of one layer in one shard, without a copy."""
        tensors = self._shard(split, shard)
        return Rows(
            tensors[f"layer.{layer}.x"][start:stop], tensors[f"layer.{layer}.mask"][start:stop]
        )

    def fired(self) -> dict[int, Tensor]:
        """Per layer (F,) int64: on how many of all tokens each neuron fired."""
        stats = load_file(self.folder / "stats.safetensors")
        return {i: stats[f"layer.{i}.fired"] for i in self.manifest.layers}

    def _open_shard(self, split: str, shard: int) -> dict[str, Tensor]:
        path = self.folder / _shard_name(split, shard)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: shard is missing or damaged ({error}); collect again"
            ) from error


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"
