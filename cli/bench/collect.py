"""`sparsecast bench collect`: what recording costs, measured on the same batches in one run.

    bare        the decoder's forward pass, without the LM head
    recording   the same plus everything that `sparsecast collect` does from the hooks on, until the
                last shard is hashed and written
    recipe      the forward pass plus what public predictor trainers do: copy two float16 matrices
                per layer, inputs and x1, to the host and into NumPy memory maps, layer by layer

A round runs bare, recording, bare, so a device that slows down as it warms up favors neither.
Ratios are taken within a round; medians over rounds are reported.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from sparsecast.cli.bench.collect_model import SHAPES, random_model, random_rows
from sparsecast.cli.bench.collect_rounds import Workload, run_rounds
from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.cli.bench.rounds import device_name
from sparsecast.collect.store.shard import Shape
from sparsecast.collect.store.units import units
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log, show
from sparsecast.core.models.loading import (
    check_seq_len,
    embedding_rows,
    load_model,
    pick_device,
    pick_dtype,
)
from sparsecast.core.models.shape import model_shape
from sparsecast.core.options import DeviceMap, ModelDtype, check_device_map, validate_fields
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import Sequence, tokenize_documents


@dataclass(frozen=True, kw_only=True)
class BenchCollectConfig:
    """Time recording against the bare forward pass and the public recipe."""

    model: str | None = None
    """Hugging Face id or folder; unset: random weights of --shape."""

    shape: Literal["60m", "7b", "70b"] = "60m"
    """60m, 7b or 70b: a relu llama with random weights and documents of random length."""

    corpus: str | None = None
    """Text for --model; unset: builtin."""

    tokens: int = 16_384
    """Tokens per round."""

    seq_len: int = 512
    """Tokens that the model reads at once; longer documents become several windows."""

    batch_size: int = 8
    """Sequences of --seq-len tokens per forward pass."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    device_map: DeviceMap | None = None
    """Spread the model over all GPUs, as --device-map of `collect` does; not with --device."""

    dtype: ModelDtype = "auto"
    """auto (float32 on the CPU, else the checkpoint's or bfloat16), float32, float16, bfloat16."""

    sink: Literal["disk", "memory"] = "disk"
    """disk, or memory: finish and hash shards, then drop them."""

    folder: Path | None = None
    """Where to write; unset: a temporary folder."""

    energy: bool = False
    """Record energies too."""

    rounds: int = 3
    """Timed rounds, after one untimed round."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=1, seq_len=2, batch_size=1, rounds=1)
        if self.corpus is not None and self.model is None:
            raise InputError(
                "--corpus: is read for --model alone; a random model gets random tokens"
            )
        check_device_map(self.device_map, self.device)


def bench_collect(cfg: BenchCollectConfig) -> dict[str, Any]:
    """Tokens/s, ratios and bytes, also written to `cfg.json`.

    Memory beyond the model: as for `collect`, plus the recipe's files: about 2 GiB, or one batch
    if that is larger.
    """
    check_json(cfg.json)
    if cfg.folder is not None and not (cfg.folder.is_dir() and os.access(cfg.folder, os.W_OK)):
        raise InputError(f"--folder: {cfg.folder} is not a folder that can be written")
    work = _workload(cfg)
    folder = Path(tempfile.mkdtemp(prefix="sparsecast-bench-", dir=cfg.folder))
    try:
        values = run_rounds(work, cfg.rounds, folder, to_disk=cfg.sink == "disk")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    values |= {
        "sink": cfg.sink,
        "device": device_name(work.model.device),
        "device_map": cfg.device_map,
        "devices": len({w.device for w in work.model.parameters()}),
        "dtype": str(work.model.dtype).removeprefix("torch."),
        "model": cfg.model or f"random {cfg.shape}",
        "parameters": sum(p.numel() for p in work.model.base_model.parameters()),
        "tokens": work.tokens,
        "layers": len(work.shape.layers),
        "hidden_size": work.shape.hidden_size,
        "ffn_width": work.shape.ffn_width,
        "torch": torch.__version__,
    }
    return publish(values, cfg.json, _show)


def _workload(cfg: BenchCollectConfig) -> Workload:
    """The model, and its batches in units as `collect` makes them."""
    skipped = SkippedRows(cfg.corpus or "builtin")
    model, rows = _random(cfg) if cfg.model is None else _given(cfg, cfg.model, skipped)
    sizes = model_shape(model)
    shape = Shape(
        layers=range(sizes.layers),
        hidden_size=sizes.hidden_size,
        ffn_width=sizes.ffn_width,
        x_dtype="bfloat16" if model.dtype == torch.bfloat16 else "float16",
        energy=cfg.energy,
    )
    found = units(
        rows, seq_len=cfg.seq_len, batch_size=cfg.batch_size, shard_tokens=shape.shard_tokens
    )
    if not (batches := list(found)):
        raise InputError(f"{skipped.corpus}: no text to time on")
    skipped.tell()
    return Workload(model, shape, batches)


def _given(
    cfg: BenchCollectConfig, source: str, skipped: SkippedRows
) -> tuple[PreTrainedModel, Iterator[Sequence]]:
    """The user's model, and documents of the corpus."""
    model, tokenizer = load_model(
        source, device=cfg.device, dtype=cfg.dtype, device_map=cfg.device_map
    )
    check_seq_len(cfg.seq_len, model, source)
    docs = read_documents(
        skipped.corpus, seq_len=cfg.seq_len, long_documents="split", skipped=skipped
    )
    rows = tokenize_documents(
        assign_splits(docs),
        tokenizer,
        {"train": cfg.tokens},
        cfg.seq_len,
        embedding_rows(model),
        long_documents="split",
        skipped=skipped,
    )
    return model, rows


def _random(cfg: BenchCollectConfig) -> tuple[PreTrainedModel, Iterator[Sequence]]:
    """A model with random weights, and documents of random tokens."""
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, None, device)
    model = random_model(SHAPES[cfg.shape], cfg.seq_len, dtype, device, cfg.device_map)
    return model, random_rows(cfg.tokens, cfg.seq_len)


def _show(values: dict[str, Any]) -> None:
    log.info(
        f"{values['model']}, {values['parameters'] / 1e6:,.0f} M parameters, "
        f"{values['dtype']} on {values['device']}, {values['tokens']:,} tokens, "
        f"sink {values['sink']}"
    )
    table = new_table("", "tokens/s", "of bare", "bytes per token and layer")
    speed = values["tokens_per_s"]
    table.add_row("bare forward", f"{speed['bare']:,.0f}", "", "")
    table.add_row(
        "recording",
        f"{speed['recording']:,.0f}",
        f"{values['kept']:.1%}",
        f"{values['bytes_per_token_layer']:,.1f} (bound {values['bound']:,.1f})",
    )
    table.add_row(
        "two f16 matrices",
        f"{speed['recipe']:,.0f}",
        f"{values['recipe_kept']:.1%}",
        f"{values['recipe_bytes_per_token_layer']:,.1f}",
    )
    show(table)
    if values["tokens"] < speed["bare"]:
        log.warning("a round took less than a second, too short to measure well; raise --tokens")
    if values["write_mb_per_s"] is not None:
        log.info(
            f"sequential write {values['write_mb_per_s']:,.0f} MB/s; recording reaches "
            f"{values['kept_of_limit']:.1%} of the slower of bare forward and disk"
        )
