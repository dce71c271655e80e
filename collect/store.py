"""ACTS: recorded activations on disk.

    manifest.json               what was recorded, from which model and text, and the real counts
    <split>-<nnnnn>.safetensors one shard each, see shard.py
    stats.safetensors           counts over every token, see stats.py

`Shape.bound` states the bytes per token and layer.

Shape letters: T tokens, D hidden, F FFN width, P packed width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsecast.collect.atomic import read_json, write_json
from sparsecast.collect.bits import unpack
from sparsecast.collect.energy import decode
from sparsecast.collect.errors import InputError
from sparsecast.collect.plan import shard_name
from sparsecast.collect.shard import CHECKSUM, INPUT_DTYPES, Shape
from sparsecast.collect.splits import SPLITS
from sparsecast.collect.stats import STATS, Stats, read_stats

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an activation store holds; `options` are those of the command that made it.

    While a collection runs, its folder has a manifest without counts.
    """

    model: str
    fingerprint: str
    """Of the model's weights, see `Checkpoint.fingerprint`."""
    model_type: str
    config: dict[str, Any]
    """The model's, as it ran; see `effective` in checkpoint.py."""
    dtype: str
    """The model's, while it ran."""
    threads: int
    """CPU threads while it ran: sums depend on their number."""
    tokenizer: str
    """Its class, vocabulary size and checksum."""
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
    """float16, bfloat16, float32, or int8 with a scale per token."""
    energy: bool
    shard_tokens: dict[str, list[int]] = field(default_factory=dict)
    """Per split, the number of tokens of each shard."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Shard file to the checksum of its header, which has that of the data behind it; the
    statistics' file and this one, without its own checksum, to theirs."""
    documents: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    """Per split, how many of the documents were longer than --seq-len."""
    format_version: int = FORMAT_VERSION

    @property
    def shape(self) -> Shape:
        return Shape(
            layers=tuple(self.layers),
            hidden_size=self.hidden_size,
            ffn_width=self.ffn_width,
            x_dtype=self.x_dtype,
            energy=self.energy,
        )

    def tokens(self, split: str | None = None) -> int:
        """Stored tokens, of one split or of all three."""
        splits = SPLITS if split is None else (split,)
        return sum(sum(self.shard_tokens.get(name, [])) for name in splits)


class Rows(NamedTuple):
    """A run of consecutive tokens of one layer."""

    x_TD: Tensor
    """A view of the memory map; float32 and a copy where int8 is stored."""
    mask_TP: Tensor
    """A view of the memory map; see bits.py."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    sums = {**manifest.checksums, MANIFEST: _own_checksum(manifest)}
    write_json(folder / MANIFEST, asdict(replace(manifest, checksums=sums)))


def _own_checksum(manifest: Manifest) -> str:
    value = asdict(manifest)
    value["checksums"].pop(MANIFEST, None)
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store, finished or not."""
    path = folder / MANIFEST
    value = read_json(path, "the manifest of a `sparsecast collect` folder")
    known = {item.name for item in fields(Manifest)}
    if value.get("format_version") != FORMAT_VERSION or set(value) != known:
        raise InputError(
            f"{path}: format version {value.get('format_version')}, expected an activation store "
            f"of version {FORMAT_VERSION}; collect again"
        )
    manifest = Manifest(**value)
    if (name := _senseless(manifest)) is not None:
        raise InputError(f"{path}: damaged, its {name} makes no sense; collect again")
    return manifest


def _senseless(made: Manifest) -> str | None:
    """The field of a manifest that no collection could have written; None where all is well."""
    texts = ("model", "fingerprint", "model_type", "dtype", "tokenizer", "convention", "activation")
    sizes = ("threads", "hidden_size", "ffn_width", "ffn_matrices")
    rules: dict[str, bool] = {
        **{name: isinstance(getattr(made, name), str) for name in (*texts, "corpus")},
        **{name: _count(getattr(made, name)) for name in sizes},
        "activation_threshold": isinstance(made.activation_threshold, (int, float)),
        "layers": isinstance(made.layers, list)
        and bool(made.layers)
        and all(_count(layer, least=0) for layer in made.layers),
        "x_dtype": made.x_dtype in INPUT_DTYPES,
        "energy": isinstance(made.energy, bool),
        "config": isinstance(made.config, dict),
        "options": isinstance(made.options, dict),
        "checksums": isinstance(made.checksums, dict),
        **{
            name: isinstance(table := getattr(made, name), dict)
            and all(_count(value, least=0) for value in table.values())
            for name in ("documents", "truncated")
        },
        "shard_tokens": isinstance(made.shard_tokens, dict)
        and (not made.shard_tokens or set(SPLITS) <= set(made.shard_tokens))
        and all(
            isinstance(counts, list) and counts and all(map(_count, counts))
            for counts in made.shard_tokens.values()
        ),
    }
    return next((name for name, sound in rules.items() if not sound), None)


def _count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class ActivationStore:
    """Read access, per layer and by runs of tokens, through memory maps.

    Memory: none of its own; pages that were read belong to the page cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest.shard_tokens:
            raise InputError(
                f"{self.folder}: an unfinished collection; run its `sparsecast collect` command "
                "again, which goes on from there"
            )
        self._shard = lru_cache(maxsize=None)(self._open_shard)

    def shards(self, split: str) -> list[int]:
        """Tokens per shard of a split."""
        return self.manifest.shard_tokens.get(split, [])

    def rows(
        self, split: str, shard: int, layer: int, start: int = 0, stop: int | None = None
    ) -> Rows:
        """Tokens [start, stop) of one layer in one shard."""
        tensors = self._shard(split, shard)
        x_TD = tensors[f"layer.{layer}.x"][start:stop]
        if self.manifest.x_dtype == "int8":
            x_TD = x_TD.float() * tensors[f"layer.{layer}.scale"][start:stop, None]
        return Rows(x_TD, tensors[f"layer.{layer}.mask"][start:stop])

    def tokens(self, split: str, shard: int) -> tuple[Tensor, Tensor]:
        """Token ids and positions in their documents of one shard, both (T,) int32."""
        tensors = self._shard(split, shard)
        return tensors["id"], tensors["position"]

    def energies(
        self, split: str, shard: int, layer: int, start: int = 0, stop: int | None = None
    ) -> Tensor | None:
        """(T, F) float32 energies of tokens [start, stop), 0 where inactive; None if not stored."""
        if not self.manifest.energy:
            return None
        tensors = self._shard(split, shard)
        active_T = tensors[f"layer.{layer}.active"]
        mask_TF = unpack(tensors[f"layer.{layer}.mask"][start:stop], self.manifest.ffn_width)
        first = int(active_T[:start].sum())
        codes_N = tensors[f"layer.{layer}.energy"][first : first + int(active_T[start:stop].sum())]
        return torch.zeros(mask_TF.shape).masked_scatter_(mask_TF, decode(codes_N))

    def stats(self) -> Stats:
        """Counts over every token, stored or only counted."""
        return read_stats(self.folder / STATS, self.manifest.layers)

    def damages(self) -> Iterator[tuple[str, str | None]]:
        """Every file with what is wrong with it, or None; reads all of them whole."""
        for split, counts in self.manifest.shard_tokens.items():
            for number in range(len(counts)):
                name = shard_name(split, number)
                want = self.manifest.checksums.get(name, "none in the manifest")
                what = damage(self.folder / name, want)
                if what is None:
                    try:
                        self._shard(split, number)
                    except InputError as error:
                        what = str(error)
                yield name, what
        found = {
            MANIFEST: _own_checksum(self.manifest),
            STATS: file_checksum(path) if (path := self.folder / STATS).is_file() else "no file",
        }
        for name, value in found.items():
            states = self.manifest.checksums.get(name)
            told = f"{self.folder / name}: damaged ({value}, expected {states})"
            yield name, None if value == states else told

    def _open_shard(self, split: str, shard: int) -> dict[str, Tensor]:
        path, want = self.folder / shard_name(split, shard), self.shards(split)[shard]
        tensors = read_shard(path)
        if (found := len(tensors.get("id", ()))) != want:
            raise InputError(
                f"{path}: holds {found} tokens, but {MANIFEST} says {want}; one of them belongs to "
                "another store: collect again"
            )
        if what := self.manifest.shape.misfit(tensors, want, stored=split in SPLITS):
            raise InputError(
                f"{path}: {what}, going by {MANIFEST}; one of them belongs to another store: "
                "collect again"
            )
        return tensors


def read_shard(path: Path) -> dict[str, Tensor]:
    """A shard's tensors as views of its memory map."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: shard is missing or damaged ({error}); collect again") from error


def damage(path: Path, want: str | None = None) -> str | None:
    """What is wrong with one shard, read whole; None when it is as it was written.

    Args:
        want: The checksum of its header, where a manifest states it.
    """
    try:
        with path.open("rb") as file:
            header = _header(file)
            found = xxhash.xxh3_128_hexdigest(header)
            if want is not None and found != want:
                return f"{path}: damaged, its header has {CHECKSUM} {found}, expected {want}"
            states = json.loads(header[8:])["__metadata__"][CHECKSUM]
            digest = xxhash.xxh3_128()
            while block := file.read(1 << 24):
                digest.update(block)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror or error})"
    except (ValueError, KeyError, TypeError):
        return f"{path}: damaged header"
    if digest.hexdigest() != states:
        return f"{path}: damaged, its data has {CHECKSUM} {digest.hexdigest()}, expected {states}"
    return None


def header_checksum(path: Path) -> str:
    """Of a shard's header, which has the checksum of the data."""
    with path.open("rb") as file:
        return xxhash.xxh3_128_hexdigest(_header(file))


def file_checksum(path: Path) -> str:
    """Of a small file, whole."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _header(file: BinaryIO) -> bytes:
    """Length and text of a safetensors header."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if size > 100_000_000:
        raise ValueError("no safetensors header")
    return length + file.read(size)
