"""`sparsecast bench collect`: what recording costs, on the same batches in one run.

    bare        the batches through the decoder, without the LM head
    recording   the same with everything `sparsecast collect` does from the hooks on, until the
                last shard is hashed and written
    recipe      the same with two float16 matrices per layer, inputs and x1, copied to the host and
                into NumPy memory maps layer by layer, as public predictor trainers do

A round runs bare, recording, bare, so that a device that slows as it warms up favors neither;
ratios are taken within a round, and medians reported.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sparsecast.cli.bench.collect_runs import (
    bare,
    empty,
    recipe,
    recipe_share,
    recording,
    timed,
    write_rate,
)
from sparsecast.collect.store.shard import Shape, ShardBuffer
from sparsecast.collect.store.units import Unit, units
from sparsecast.collect.store.writer import Writer, to_folder, to_memory
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import log, show
from sparsecast.core.models.loading import (
    check_seq_len,
    embedding_rows,
    load_model,
    pick_device,
    pick_dtype,
)
from sparsecast.core.models.shape import model_shape
from sparsecast.core.options import ModelDtype, validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import Sequence, tokenize_documents

SHAPES = {
    "60m": (768, 2048, 8),
    "7b": (4096, 11008, 32),
}
"""(hidden size, FFN width, layers) of llamas with random weights: 57 million and 6.5 billion
parameters in the decoder layers."""
HEAD_DIM = 128
VOCAB = 32_000


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time recording against the bare forward pass and the public recipe."""

    model: str | None = None
    """Hugging Face id or folder; unset: random weights of --shape."""

    shape: Literal["60m", "7b"] = "60m"
    """60m or 7b: a relu llama with random weights and documents of random length."""

    corpus: str | None = None
    """Text for --model; unset: builtin."""

    tokens: int = 16_384
    """Tokens per round."""

    seq_len: int = 512
    """Documents are truncated to this many tokens."""

    batch_size: int = 8
    """Sequences of --seq-len tokens per forward pass."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    dtype: ModelDtype = "auto"
    """auto (float32 on the CPU, else the checkpoint's or bfloat16), float32, float16, bfloat16."""

    sink: Literal["disk", "memory"] = "disk"
    """disk, or memory: shards are finished and hashed, then dropped."""

    folder: Path | None = None
    """Where to write; unset: a temporary folder."""

    energy: bool = False
    """Record energies too."""

    rounds: int = 3
    """Timed rounds, after one that is not."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=1, seq_len=2, batch_size=1, rounds=1)
        if self.corpus is not None and self.model is None:
            raise InputError(
                "--corpus: is read for --model alone; a random model gets random tokens"
            )


def bench(cfg: BenchConfig) -> dict[str, Any]:
    """Run it; tokens/s, ratios and bytes, also written to `cfg.json`.

    Memory beyond the model: as `collect`, and the recipe's files, about 2 GiB or one batch.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    if cfg.folder is not None and not (cfg.folder.is_dir() and os.access(cfg.folder, os.W_OK)):
        raise InputError(f"--folder: {cfg.folder} is not a folder that can be written")
    model, rows = _subject(cfg)
    sizes = model_shape(model)
    x_dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float16"
    shape = Shape(
        layers=range(sizes.layers),
        hidden_size=sizes.hidden_size,
        ffn_width=sizes.ffn_width,
        x_dtype=x_dtype,
        energy=cfg.energy,
    )
    plan = list(
        units(rows, seq_len=cfg.seq_len, batch_size=cfg.batch_size, shard_tokens=shape.shard_tokens)
    )
    if not plan:
        raise InputError(f"{cfg.corpus or 'builtin'}: no text to time on")
    capacity = shape.nbytes(max(unit.tokens for unit in plan))
    folder = Path(tempfile.mkdtemp(prefix="sparsecast-bench-", dir=cfg.folder))
    try:
        sink = _Sink(folder if cfg.sink == "disk" else None)
        with Writer(shape, capacity, sink, pinned=model.device.type == "cuda") as writer:
            values = _rounds(cfg, model, shape, plan, writer, folder, sink)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    values |= {
        "sink": cfg.sink,
        "device": _device_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": cfg.model or f"random {cfg.shape}",
        "parameters": sum(p.numel() for p in model.base_model.parameters()),
        "tokens": sum(unit.tokens for unit in plan),
        "layers": sizes.layers,
        "hidden_size": sizes.hidden_size,
        "ffn_width": sizes.ffn_width,
        "torch": torch.__version__,
    }
    _show(values)
    if cfg.json is not None:
        write_json(cfg.json, values)
    return values


class _Sink:
    """Where finished shards go, and the bytes of a round, those of energies apart too."""

    def __init__(self, folder: Path | None) -> None:
        self._write = None if folder is None else to_folder(folder)
        self._lock = Lock()
        self.clear()

    def clear(self) -> None:
        self.written = self.energies = 0

    def __call__(self, name: str, buffer: ShardBuffer) -> None:
        if self._write is None:
            written = to_memory(name, buffer)
        else:
            self._write(name, buffer)
            written = buffer.nbytes
        with self._lock:
            self.written += written
            self.energies += buffer.energy_bytes


def _rounds(
    cfg: BenchConfig,
    model: PreTrainedModel,
    shape: Shape,
    plan: list[Unit],
    writer: Writer,
    folder: Path,
    sink: _Sink,
) -> dict[str, Any]:
    tokens = sum(unit.tokens for unit in plan)
    recipe_units, recipe_tokens = recipe_share(shape, plan)
    seconds: dict[str, list[float]] = {}
    with progress_bar("bench", 5 * (cfg.rounds + 1)) as progress, torch.inference_mode():
        for number in range(cfg.rounds + 1):
            sink.clear()
            took = {"bare": timed(model, lambda: bare(model, plan)) / 2}
            progress.advance()
            took["recording"] = timed(model, lambda: recording(model, shape, plan, writer))
            progress.advance()
            took["bare"] += timed(model, lambda: bare(model, plan)) / 2
            progress.advance()
            if cfg.sink == "disk":
                empty(folder)
                took["write"] = write_rate(folder, sink.written)
            progress.advance()
            took["recipe"] = timed(
                model, lambda: recipe(model, shape, recipe_units, folder, disk=cfg.sink == "disk")
            )
            empty(folder)
            progress.advance()
            if number:
                for name, value in took.items():
                    seconds.setdefault(name, []).append(value)
    bares = seconds["bare"]
    kept = [b / r for b, r in zip(bares, seconds["recording"], strict=True)]
    rate = {"bare": tokens, "recording": tokens, "recipe": recipe_tokens}
    values: dict[str, Any] = {
        "kept": statistics.median(kept),
        "kept_rounds": kept,
        "tokens_per_s": {
            name: count / statistics.median(seconds[name]) for name, count in rate.items()
        },
        "bytes_per_token_layer": sink.written / tokens / len(shape.layers),
        "bound": shape.bound + sink.energies / tokens / len(shape.layers),
        "recipe_bytes_per_token_layer": 2 * (shape.hidden_size + shape.ffn_width),
        "write_mb_per_s": None,
        "kept_of_limit": None,
    }
    speed = values["tokens_per_s"]
    values["recipe_kept"] = speed["recipe"] / speed["bare"]
    if "write" in seconds:
        written = [sink.written / 1e6 / s for s in seconds["write"]]
        values["write_mb_per_s"] = statistics.median(written)
        slower = [max(pair) for pair in zip(bares, seconds["write"], strict=True)]
        limit = [b / r for b, r in zip(slower, seconds["recording"], strict=True)]
        values["kept_of_limit"] = statistics.median(limit)
    return values


def _subject(cfg: BenchConfig) -> tuple[PreTrainedModel, Iterator[Sequence]]:
    """The model and the sequences to time."""
    if cfg.model is not None:
        model, tokenizer = load_model(cfg.model, device=cfg.device, dtype=cfg.dtype)
        check_seq_len(cfg.seq_len, model, cfg.model)
        rows = tokenize_documents(
            assign_splits(read_documents(cfg.corpus or "builtin", seq_len=cfg.seq_len)),
            tokenizer,
            {"train": cfg.tokens},
            cfg.seq_len,
            embedding_rows(model),
        )
        return model, rows
    device = pick_device(cfg.device)
    hidden_size, ffn_width, layers = SHAPES[cfg.shape]
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        vocab_size=VOCAB,
        hidden_act="relu",
        max_position_embeddings=cfg.seq_len,
    )
    torch.manual_seed(0)
    with device:
        made: Any = AutoModelForCausalLM.from_config(
            config, dtype=pick_dtype(cfg.dtype, None, device), trust_remote_code=False
        )
    return made.eval(), _random_rows(cfg)


def _random_rows(cfg: BenchConfig) -> Iterator[Sequence]:
    """Lengths uniform up to twice --seq-len, so that half of the documents are cut."""
    draw = np.random.default_rng(0)
    left = cfg.tokens
    while left > 0:
        length = min(int(draw.integers(2, 2 * cfg.seq_len)), cfg.seq_len, left)
        yield Sequence("train", draw.integers(0, VOCAB, length).tolist(), length == cfg.seq_len)
        left -= length


def _device_name(model: PreTrainedModel) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"CPU, {torch.get_num_threads()} threads"


def _show(values: dict[str, Any]) -> None:
    log.info(
        f"{values['model']}, {values['parameters'] / 1e6:,.0f} M parameters, "
        f"{values['dtype']} on {values['device']}, {values['tokens']:,} tokens, "
        f"sink {values['sink']}"
    )
    table = Table()
    for name in ("", "tokens/s", "of bare", "bytes per token and layer"):
        table.add_column(name, justify="left" if not name else "right")
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
        log.warning("a round took less than a second, which says little; raise --tokens")
    if values["write_mb_per_s"] is not None:
        log.info(
            f"sequential write {values['write_mb_per_s']:,.0f} MB/s; recording reaches "
            f"{values['kept_of_limit']:.1%} of the slower of bare forward and disk"
        )
