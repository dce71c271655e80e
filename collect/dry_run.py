"""What a collection will take, before it starts: a batch is recorded on the model's first layers.

Weights and the store follow from shapes. A model of the first layer, and one of the first two, with
embedding, record a batch of random tokens into memory; what the second layer adds to the time is
multiplied by the number of layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.estimate import check_fits, missing_bytes
from sparsecast.collect.first_batch import MOST_PASSES, checked_tokens
from sparsecast.collect.outline import Outline, make_outline
from sparsecast.collect.output import check_resumable, output_folder, unfinished
from sparsecast.collect.recording import recorder_of
from sparsecast.collect.run import device_of_rank, finished_store, identity
from sparsecast.collect.store.units import Unit
from sparsecast.collect.store.writer import BUFFERS, Writer, record_unit, to_memory
from sparsecast.core.disk import format_bytes
from sparsecast.core.distributed import DistributedContext, distributed_context
from sparsecast.core.dry_run import (
    PYTHON,
    UNMEASURED,
    Forecast,
    base_memory,
    check_forecast,
    extrapolate,
    show_forecast,
    timed,
)
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.first_layers import (
    Measured,
    load_first_layers,
    measure,
    model_memory,
)
from sparsecast.core.models.loading import check_checkpoint, input_device
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.corpus_files import is_stream, local_files
from sparsecast.core.text.tokens import COUNTED, TokenBatch

HOW = "from a batch on one and on two layers"


def forecast(cfg: CollectConfig) -> Forecast | None:
    """Show what `collect` with these options will take, and return it; None on other ranks.

    Under torchrun the first rank measures for all. Nothing is written.

    Raises:
        InputError: What `collect` refuses before it loads the model; or a run that the disk or the
            memory cannot hold, after the table.
    """
    with distributed_context() as ranks:
        if not ranks.leads:
            return None
        cfg = replace(cfg, out=output_folder(cfg.out), device=device_of_rank(cfg, ranks))
        checkpoint = Checkpoint(cfg.model)
        if (cfg.out / MANIFEST).is_file():
            finished_store(cfg, checkpoint)
            return None
        return _forecast(cfg, checkpoint, ranks)


def _forecast(cfg: CollectConfig, checkpoint: Checkpoint, ranks: DistributedContext) -> Forecast:
    outline = make_outline(cfg, checkpoint)
    if checkpoint.files:
        _check_unfinished(cfg, checkpoint, outline)
    if cfg.corpus != "builtin" and not is_stream(cfg.corpus) and local_files(cfg.corpus):
        next(read_documents(cfg.corpus), None)  # refuses what holds no text
    base = base_memory(outline.device)
    misfit: InputError | None = None
    measured: list[Measured] = []
    try:
        check_fits(cfg, checkpoint, outline.device, outline.dtype, outline.needs)
    except InputError as error:
        misfit = error
    else:
        measured = [measure_recording(cfg, checkpoint, outline, count) for count in (1, 2)]
    found = _put_together(cfg, checkpoint, outline, base, measured, ranks)
    show_forecast(found)
    if misfit is not None:
        raise misfit
    check_forecast(found, "choose a smaller --batch-size or --dtype")
    return found


def _check_unfinished(cfg: CollectConfig, checkpoint: Checkpoint, outline: Outline) -> None:
    """Check the model's files, and that an interrupted run can go on with these options."""
    tokenizer = check_checkpoint(checkpoint)
    if (earlier := unfinished(cfg.out)) is not None:
        now = identity(cfg, checkpoint, tokenizer)
        now |= {"dtype": str(outline.dtype).removeprefix("torch.")}
        now |= {"x_dtype": outline.shape.x_dtype}
        check_resumable(cfg.out, earlier, replace(earlier, **now))


def measure_recording(
    cfg: CollectConfig, checkpoint: Checkpoint, outline: Outline, layers: int
) -> Measured:
    """Load the first layers, and record a batch on them."""
    shape = replace(outline.shape, layers=range(layers))
    most = sum(outline.tokens.values())
    sequences = max(1, min(cfg.batch_size, most // cfg.seq_len))
    ids_BS = torch.randint(outline.model.config.vocab_size, (sequences, min(cfg.seq_len, most)))
    batch = TokenBatch("train", ids_BS, torch.ones_like(ids_BS, dtype=torch.bool))
    unit = Unit("train", 0, [batch])

    def use(model: PreTrainedModel) -> float:
        filler, recorder = recorder_of(model, shape)
        where = input_device(model)
        size, on_gpu = shape.nbytes(batch.tokens), where.type == "cuda"
        with (
            Writer(shape, size, to_memory, pinned=on_gpu) as writer,
            torch.inference_mode(),
            recorder,
        ):

            def record() -> None:
                record_unit(filler, writer, unit, forward)
                writer.drain()

            def forward(batch: TokenBatch) -> None:
                model.base_model(batch.to(where).ids_BS, use_cache=False)

            return timed(record, outline.device) / batch.tokens

    def load() -> Any:
        return load_first_layers(
            checkpoint, layers, dtype=outline.dtype, device=outline.device, rule=outline.rule
        )

    return measure(load, use, outline.device)


def _put_together(
    cfg: CollectConfig,
    checkpoint: Checkpoint,
    outline: Outline,
    base: int,
    measured: list[Measured],
    ranks: DistributedContext,
) -> Forecast:
    needs, device = outline.needs, outline.device
    shards = {"shards": _shard_bytes(outline)}
    one = measured[0] if measured else None
    host, pages, on_device = model_memory(
        checkpoint, device, outline.dtype, needs.model, one, shards
    )
    seconds = {}
    if measured:
        one, two = measured
        layers = outline.model.config.num_hidden_layers
        if checkpoint.files:
            seconds["loading"] = two.load_seconds * needs.model / two.weights
        every = sum(outline.tokens.values())
        tokens = every / ranks.size + MOST_PASSES * checked_tokens(every)
        seconds["recording"] = tokens * extrapolate(layers, {1: one.seconds, 2: two.seconds})
    rate = ""
    if seconds and device.type == "cuda":
        rate = f"; the disk has to take {format_bytes(needs.store / seconds['recording'])} a second"
    return Forecast(
        what=f"{cfg.out}: collect",
        out=cfg.out,
        disk=missing_bytes(cfg.out, needs),
        device=device,
        host={PYTHON: base, **host},
        pages=pages,
        on_device=on_device,
        seconds=seconds,
        note=HOW + rate if seconds else UNMEASURED,
        processes=ranks.size,
    )


def _shard_bytes(outline: Outline) -> int:
    """Return the bytes of the shards that are in memory at once: those that a GPU's pinned buffers
    have room for; on a CPU two, since a shard is written before the next one is full."""
    shape, full, sizes = outline.shape, outline.largest_shard, []
    for split, tokens in outline.tokens.items():
        for count in [full] * min(BUFFERS, tokens // full) + [tokens % full]:
            fields = shape.fields(count, stored=split != COUNTED)
            sizes.append(sum(field.nbytes for field in fields))
    if outline.device.type == "cuda":
        return min(BUFFERS, len(sizes)) * shape.nbytes(full)
    return sum(sorted(sizes)[-2:])
