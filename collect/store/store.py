"""The activation store ("ACTS" in short): a folder of recorded activations.

    manifest.json               what was recorded, from which model and text, and the real counts
    <split>-<nnnnn>.safetensors one shard each, see shard.py
    stats.safetensors           counts over every token, see stats.py

`Shape.bound` states the bytes per token and layer. Opening a store checks the manifest
against its own checksum and every shard's header against the manifest. A shard's tensors are
checked one by one when first read, see shard_reader.py.

Shape letters: T tokens, D hidden, F FFN width, P packed width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from sparsecast.collect.store.energy import decode
from sparsecast.collect.store.routing import expert_rows, is_routing, routed_tokens
from sparsecast.collect.store.shard import INPUT_DTYPES, Shape
from sparsecast.collect.store.shard_reader import AGAIN, ShardFile, header_checksum, read_header
from sparsecast.collect.store.stats import STATS, Stats, merge, read_stats, write_stats
from sparsecast.collect.store.units import ShardInfo, shard_name
from sparsecast.core.bitmask import unpack
from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json
from sparsecast.core.folders import check_folder_kind
from sparsecast.core.manifests import (
    MANIFEST,
    check_keys,
    check_version,
    find_edit,
    is_checksums,
    is_count,
    is_number,
    is_shallow,
    is_text,
    optional,
    write_manifest,
)
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.ffns import ffn_numbers
from sparsecast.core.models.shape import ModelShape
from sparsecast.core.text.splits import SPLITS
from sparsecast.core.text.tokens import COUNTED

FORMAT_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of an activation store; `options` are those of the command that wrote it.

    While a collection runs, its folder has a manifest without counts.
    """

    model: str
    fingerprint: str
    """Fingerprint of the model's weights, see `Checkpoint.fingerprint`."""
    model_type: str
    config: dict[str, Any]
    """The model's config as it ran; see `result_fields`."""
    dtype: str
    """The model's data type while it ran."""
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
    experts: int = optional(0)
    """Experts per layer in a mixture of experts; 0, and not in the file, in a dense model."""
    experts_per_token: int = optional(0)
    shard_tokens: dict[str, list[int]] = field(default_factory=dict)
    """Per split, the number of tokens of each shard."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Shard file to the checksum of its header, which has those of the data behind it; the
    statistics' file and this one, without its own checksum, to theirs."""
    documents: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    """Per split, how many of the documents were longer than --seq-len."""
    skipped: int = optional(0)
    """Rows of the corpus that could not be used."""
    format_version: int = FORMAT_VERSION

    @property
    def shape(self) -> Shape:
        return Shape(
            layers=tuple(self.layers),
            hidden_size=self.hidden_size,
            ffn_width=self.ffn_width,
            x_dtype=self.x_dtype,
            energy=self.energy,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
        )

    @property
    def ffns(self) -> list[int]:
        """Numbers of the recorded FFNs, see core/models/ffns.py; the layers of a dense model."""
        return ffn_numbers(self.layers, self.experts)

    @property
    def model_shape(self) -> ModelShape:
        """The model's dimensions, with the recorded layers only."""
        return ModelShape(
            layers=len(self.layers),
            hidden_size=self.hidden_size,
            ffn_width=self.ffn_width,
            ffn_matrices=self.ffn_matrices,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
        )

    @property
    def rule(self) -> ActivationRule:
        """Return the activation rule that decided which neurons fire."""
        return ActivationRule(self.activation, self.activation_threshold)

    def tokens(self, split: str | None = None) -> int:
        """Return the number of stored tokens of one split or of all three."""
        splits = SPLITS if split is None else (split,)
        return sum(sum(self.shard_tokens.get(name, [])) for name in splits)


class Rows(NamedTuple):
    """Tokens of one FFN: consecutive ones, or those that were routed to an expert."""

    x_TD: Tensor
    """A view of the memory map; float32 where int8 is stored, and a copy then or of an expert."""
    mask_TP: Tensor
    """A view of the memory map, or a copy of an expert's; see core/bitmask.py."""


def seal(folder: Path, manifest: Manifest, shards: Iterable[ShardInfo]) -> Manifest:
    """Finish a store whose shards are written: statistics, checksums and the complete manifest.

    Args:
        shards: In the order of their numbers.
    """
    shards = list(shards)
    counts = ((shard.split, ShardFile(folder / shard.name)) for shard in shards)
    stats = merge(counts, manifest.layers, manifest.ffn_width, manifest.experts)
    write_stats(folder / STATS, stats)
    tokens: dict[str, list[int]] = {}
    for shard in shards:
        tokens.setdefault(shard.split, []).append(shard.tokens)
    checksums = {shard.name: header_checksum(folder / shard.name) for shard in shards}
    checksums[STATS] = xxhash.xxh3_128_hexdigest((folder / STATS).read_bytes())
    done = replace(manifest, shard_tokens=tokens, checksums=checksums)
    write_manifest(folder, done)
    return done


def read_manifest(folder: Path, *, checked: bool = True) -> Manifest:
    """Read the manifest of a store, finished or not.

    Args:
        checked: Whether it must be as it was written; see `find_edit`.

    Raises:
        InputError: None there, another kind of folder, another version, or no manifest that a
            collection could have written.
    """
    path, again = folder / MANIFEST, "remove the folder and collect again"
    if not path.is_file() or folder.is_file():
        check_folder_kind(folder, "activations")
    value = read_json(path, "the manifest of a `sparsecast collect` folder")
    if "shard_tokens" not in value:
        check_folder_kind(folder, "activations")
    check_version(path, value, FORMAT_VERSION, again)
    check_keys(path, value, Manifest, again)
    manifest = Manifest(**value)
    if (name := _senseless(manifest)) is not None:
        raise InputError(f"{path}: damaged, its {name} makes no sense; {AGAIN}")
    if checked and (what := find_edit(path, manifest, AGAIN)) is not None:
        raise InputError(what)
    return manifest


def _senseless(manifest: Manifest) -> str | None:
    """Name a field that no collection could have written; None if there is none."""
    texts = ("model", "fingerprint", "model_type", "dtype", "tokenizer", "convention", "activation")
    sizes = ("threads", "hidden_size", "ffn_width")
    rules: dict[str, bool] = {
        **{name: is_text(getattr(manifest, name)) for name in (*texts, "corpus")},
        **{name: is_count(getattr(manifest, name)) for name in sizes},
        "ffn_matrices": manifest.ffn_matrices in (2, 3),
        "activation_threshold": is_number(manifest.activation_threshold),
        "layers": isinstance(manifest.layers, list)
        and bool(manifest.layers)
        and all(is_count(layer, least=0) for layer in manifest.layers)
        and manifest.layers == sorted(set(manifest.layers)),
        "x_dtype": isinstance(manifest.x_dtype, str) and manifest.x_dtype in INPUT_DTYPES,
        "energy": isinstance(manifest.energy, bool),
        "skipped": is_count(manifest.skipped, least=0),
        "experts": is_routing(manifest.experts, manifest.experts_per_token)
        and not (manifest.experts and manifest.energy),
        "config": isinstance(manifest.config, dict) and is_shallow(manifest.config),
        "options": isinstance(manifest.options, dict) and is_shallow(manifest.options),
        "checksums": is_checksums(manifest.checksums),
        **{
            name: isinstance(table := getattr(manifest, name), dict)
            and all(is_count(value, least=0) for value in table.values())
            for name in ("documents", "truncated")
        },
        "shard_tokens": isinstance(manifest.shard_tokens, dict)
        and (not manifest.shard_tokens or set(SPLITS) <= set(manifest.shard_tokens))
        and set(manifest.shard_tokens) <= {*SPLITS, COUNTED}
        and all(
            isinstance(counts, list) and counts and all(map(is_count, counts))
            for counts in manifest.shard_tokens.values()
        ),
    }
    return next((name for name, sound in rules.items() if not sound), None)


class ActivationStore:
    """Read access, per layer and by runs of tokens, through memory maps.

    Memory: none of its own; pages that were read belong to the page cache.

    Args:
        checked: Whether manifest and headers must be as they were written; where not, `damages`
            tells.

    Raises:
        InputError: See `read_manifest`; an unfinished collection; a shard that is missing, cut
            short, or not the one that was recorded there.
    """

    def __init__(self, folder: str | Path, *, checked: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, checked=checked)
        if not self.manifest.shard_tokens:
            raise InputError(
                f"{self.folder}: an unfinished collection; run its `sparsecast collect` command "
                "again, which goes on from there"
            )
        self._shard = lru_cache(maxsize=None)(self._open_shard)
        if checked:
            for split, counts in self.manifest.shard_tokens.items():
                for number in range(len(counts)):
                    name = shard_name(split, number)
                    read_header(self.folder / name, self._states(name))

    @property
    def checksum(self) -> str:
        """Return the manifest's checksum, which covers all files through their checksums."""
        return self._states(MANIFEST)

    def shards(self, split: str) -> list[int]:
        """Return the number of tokens of each shard of a split."""
        return self.manifest.shard_tokens.get(split, [])

    def rows(
        self, split: str, shard: int, ffn: int, start: int = 0, stop: int | None = None
    ) -> Rows:
        """Return rows [start, stop) of one FFN in one shard: of its tokens, or of an expert's."""
        if self.manifest.experts:
            return self.expert_rows(split, shard, ffn, self.routed(split, shard, ffn)[start:stop])
        tensors = self._shard(split, shard)
        x_TD = tensors[f"layer.{ffn}.x"][start:stop]
        if self.manifest.x_dtype == "int8":
            x_TD = x_TD.float() * tensors[f"layer.{ffn}.scale"][start:stop, None]
        return Rows(x_TD, tensors[f"layer.{ffn}.mask"][start:stop])

    def row_counts(self, split: str, ffn: int) -> list[int]:
        """Return the number of an FFN's rows in each shard of a split."""
        if not self.manifest.experts:
            return self.shards(split)
        return [len(self.routed(split, shard, ffn)) for shard in range(len(self.shards(split)))]

    def routed(self, split: str, shard: int, ffn: int) -> Tensor:
        """Return the tokens (T,) int64 of a shard that the router gave to an expert, rising."""
        layer, expert = divmod(ffn, self.manifest.experts)
        return routed_tokens(self._shard(split, shard), layer, expert)

    def expert_rows(self, split: str, shard: int, ffn: int, token_T: Tensor) -> Rows:
        """Return the rows of tokens, any of `routed`, any number of times each."""
        layer, expert = divmod(ffn, self.manifest.experts)
        return Rows(*expert_rows(self._shard(split, shard), layer, expert, token_T))

    def positions(self, split: str, shard: int, ffn: int) -> Tensor:
        """Return the place in its document (T,) int32 of each of an FFN's rows in a shard."""
        _, position_T = self.tokens(split, shard)
        return position_T[self.routed(split, shard, ffn)] if self.manifest.experts else position_T

    def tokens(self, split: str, shard: int) -> tuple[Tensor, Tensor]:
        """Return one shard's token ids and positions in their documents, both (T,) int32."""
        tensors = self._shard(split, shard)
        return tensors["id"], tensors["position"]

    def energies(
        self, split: str, shard: int, layer: int, start: int = 0, stop: int | None = None
    ) -> Tensor | None:
        """(T, F) float32 energies of tokens [start, stop), 0 where inactive; None if not stored."""
        if not self.manifest.energy:
            return None
        code_TF = self.codes(split, shard, layer, start, stop)
        mask_TP = self._shard(split, shard)[f"layer.{layer}.mask"][start:stop]
        return decode(code_TF) * unpack(mask_TP, self.manifest.ffn_width)

    def codes(self, split: str, shard: int, layer: int, start: int, stop: int | None) -> Tensor:
        """(T, F) uint8 codes of energies, 0 where inactive; the store must have energies."""
        tensors = self._shard(split, shard)
        before = int(tensors[f"layer.{layer}.active"][:start].sum())
        mask_TF = unpack(tensors[f"layer.{layer}.mask"][start:stop], self.manifest.ffn_width)
        code_N = tensors[f"layer.{layer}.energy"][before:]
        return torch.zeros(mask_TF.shape, dtype=torch.uint8).masked_scatter_(mask_TF, code_N)

    def stats(self) -> Stats:
        """Read the firing counts over every token, stored or only counted.

        Raises:
            InputError: They are not as they were written, or are no counts of these tokens.
        """
        manifest = self.manifest
        tokens = {split: sum(counts) for split, counts in manifest.shard_tokens.items()}
        return read_stats(
            self.folder / STATS,
            self._states(STATS),
            tokens,
            manifest.layers,
            manifest.ffn_width,
            (manifest.experts, manifest.experts_per_token),
        )

    def check(self, split: str) -> None:
        """Read a split whole, which is small, before long work that ends with it."""
        for number in range(len(self.shards(split))):
            self._shard(split, number).check()

    def damages(self, *, whole: bool = True) -> Iterator[tuple[str, str | None]]:
        """Yield every file with its damage, or None.

        Args:
            whole: Read all of them to the end, not the shards' headers alone.
        """
        for split, counts in self.manifest.shard_tokens.items():
            for number in range(len(counts)):
                name, what = shard_name(split, number), None
                try:
                    shard = self._shard(split, number)
                    if whole:
                        shard.check()
                except InputError as error:
                    what = str(error)
                yield name, what
        yield MANIFEST, find_edit(self.folder / MANIFEST, self.manifest, AGAIN)
        try:
            self.stats()
            yield STATS, None
        except InputError as error:
            yield STATS, str(error)

    def _states(self, name: str) -> str:
        """Return the checksum that the manifest states for a file."""
        if (states := self.manifest.checksums.get(name)) is None:
            raise InputError(f"{self.folder / MANIFEST}: has no checksum of {name}; {AGAIN}")
        return states

    def _open_shard(self, split: str, number: int) -> ShardFile:
        name, want = shard_name(split, number), self.shards(split)[number]
        shard = ShardFile(self.folder / name, self._states(name))
        fields, manifest, stored = shard.header.fields, self.manifest, split in SPLITS
        found = fields["id"].shape[0] if "id" in fields else 0
        what = None
        if found != want:
            what = f"holds {found} tokens, but {MANIFEST} says {want}"
        elif misfit := manifest.shape.misfit(fields, want, stored=stored):
            what = f"{misfit}, going by {MANIFEST}"
        elif manifest.energy and stored:
            for layer in manifest.layers:
                energies = fields[f"layer.{layer}.energy"].shape[0]
                if (active := int(shard[f"layer.{layer}.active"].sum())) != energies:
                    what = f"layer {layer} has {active} active entries, but {energies} energies"
        if what is not None:
            raise InputError(f"{shard.path}: {what}; one of them belongs to another store: {AGAIN}")
        return shard
