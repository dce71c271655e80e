"""`sparsecast collect`: run a model over a corpus and record an activation store.

The store grows in a hidden folder beside its final one, with a manifest of the model and options
but no counts. Each shard appears there whole, and a later run skips the shards that it finds. At
the end the manifest is completed and the folder gets its final name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.estimate import check_needs
from sparsecast.collect.outline import make_outline
from sparsecast.collect.output import (
    begin_or_resume,
    lock_output,
    manifest_differences,
    output_folder,
)
from sparsecast.collect.plan import CollectionPlan
from sparsecast.collect.recording import complete, keeping_shards, record
from sparsecast.collect.store.shard import Shape
from sparsecast.collect.store.store import ActivationStore, Manifest
from sparsecast.collect.store.units import Tally
from sparsecast.core.disk import explain_full_disk
from sparsecast.core.distributed import DistributedContext, check_shared, distributed_context
from sparsecast.core.dry_run import refuse_dry_run
from sparsecast.core.earlier_runs import check_unchanged
from sparsecast.core.errors import InputError
from sparsecast.core.interrupts import stop_on_signal
from sparsecast.core.lock import clear_lock
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint, result_fields
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import load_model
from sparsecast.core.run_record import begin_run
from sparsecast.core.text.corpus import read_documents, start_reading
from sparsecast.core.text.corpus_files import is_stream
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.splits import SPLITS, assign_splits
from sparsecast.core.tokenizers.loading import load_tokenizer


def collect(cfg: CollectConfig, shares: Mapping[str, int] | None = None) -> ActivationStore:
    """Record `cfg.tokens` tokens; a finished store made with the same options is kept.

    A run that was killed at any moment continues when it is started again on the same machine, and
    ends with the bytes of an uninterrupted run. Under torchrun the ranks share the work and write
    the store that one rank would: the same tokens in the same shards, and the same bytes if it
    has as many CPU threads (torchrun sets 1).

    Args:
        shares: Tokens per split, instead of 90/5/5 of `cfg.tokens`.

    Memory beyond the model, whatever `cfg.tokens`: on the device, one layer's activations of a
    batch; on the host, 3 shards, the token ids of a few shards, and the head of the corpus that
    `assign` holds. A shard has 128 MiB, or the size of one batch if that is larger:
    `cfg.batch_size * cfg.seq_len` tokens of `Shape.token_bytes`, plus energies.

    Raises:
        InputError: See `load_model`, `documents` and `assign`; a layer out of range; a store
            under `cfg.out`, finished or not, that was made with other options; an input that
            does not fit its dtype.
        KeyboardInterrupt: After the current batch, at Ctrl-C or SIGTERM.
    """
    refuse_dry_run(cfg.dry_run, "collect.dry_run.forecast")
    with distributed_context() as ranks, stop_on_signal() as stop, ExitStack() as held:
        with ranks.together():
            given = cfg
            cfg = replace(cfg, out=output_folder(cfg.out), device=device_of_rank(cfg, ranks))
            checkpoint = Checkpoint(cfg.model)
            if (cfg.out / MANIFEST).is_file():
                if ranks.leads:
                    clear_lock(cfg.out)
                return finished_store(cfg, checkpoint)
            plan = _plan(cfg, checkpoint, shares, ranks, given)
            if ranks.leads:
                held.enter_context(lock_output(plan.out))
        with ranks.together():  # a rank that was refused leaves no folder behind
            if ranks.leads:
                begin_or_resume(plan.out, plan.manifest)
        with keeping_shards(plan, stop):
            check_shared(plan.partial, ranks)
            plan = plan.with_first_threads()
            shards, tally = record(plan, stop)
        ranks.wait()
        if ranks.leads:
            kept = "every shard is kept: make room, and the same command goes on from there"
            with explain_full_disk(plan.out, plan.store_bytes, "the store", lambda: kept):
                manifest = complete(plan, shards, tally)
            _summarize(manifest, plan.out, tally)
            plan.skipped.tell()
        ranks.wait()
    return ActivationStore(plan.out)


def device_of_rank(cfg: CollectConfig, ranks: DistributedContext) -> str:
    """Return this rank's device.

    Raises:
        InputError: A stream, or a model spread over all devices, with several ranks.
    """
    if ranks.size == 1:
        return cfg.device
    if is_stream(cfg.corpus):
        raise InputError(
            f"--corpus {cfg.corpus}: {ranks.size} ranks cannot share one stream; save it to a file"
        )
    if cfg.device_map is not None:
        raise InputError(
            f"--device-map {cfg.device_map}: spreads one copy of the model over every device, but "
            f"{ranks.size} ranks want a copy each; use it without torchrun"
        )
    return ranks.device(cfg.device)


def _plan(
    cfg: CollectConfig,
    checkpoint: Checkpoint,
    shares: Mapping[str, int] | None,
    ranks: DistributedContext,
    given: CollectConfig,
) -> CollectionPlan:
    """Resolve every option; all that needs no weights is checked before they are loaded.

    Args:
        given: The options as they were given, for run.json.
    """
    activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    checkpoint.check()
    outline = make_outline(cfg, checkpoint, shares)
    needs = outline.needs
    check_needs(cfg, checkpoint, outline.device, outline.dtype, needs)
    skipped = SkippedRows(cfg.corpus)
    read = read_documents(
        cfg.corpus, seq_len=cfg.seq_len, long_documents=cfg.long_documents, skipped=skipped
    )
    docs = start_reading(cfg.corpus, assign_splits(read))
    run = begin_run("collect", given, checkpoint=checkpoint, device=outline.device)
    model, tokenizer = load_model(
        cfg.model,
        device=cfg.device,
        dtype=cfg.dtype,
        activation_threshold=cfg.activation_threshold,
        device_map=cfg.device_map,
    )
    manifest = _manifest(cfg, checkpoint, model, tokenizer, outline.shape)
    resolved = {
        "dtype": manifest.dtype,
        "input_dtype": outline.shape.x_dtype,
        "layers": manifest.layers,
    }
    return CollectionPlan(
        model=model,
        tokenizer=tokenizer,
        documents=docs,
        quotas=outline.quotas,
        seq_len=cfg.seq_len,
        long_documents=cfg.long_documents,
        skipped=skipped,
        batch_size=cfg.batch_size,
        largest_shard=outline.largest_shard,
        manifest=manifest,
        out=cfg.out,
        store_bytes=needs.store,
        run=run.resolve(**resolved),
        ranks=ranks,
    )


def _manifest(
    cfg: CollectConfig,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    shape: Shape,
) -> Manifest:
    """Build the manifest as it is before any token is recorded."""
    family = family_of(checkpoint.config, cfg.model)
    return Manifest(
        **identity(cfg, checkpoint, tokenizer),
        model=cfg.model,
        model_type=checkpoint.config.model_type,
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        convention=family.convention,
        layers=list(shape.layers),
        hidden_size=shape.hidden_size,
        ffn_width=shape.ffn_width,
        ffn_matrices=family.matrices,
        x_dtype=shape.x_dtype,
        energy=shape.energy,
        experts=shape.experts,
        experts_per_token=shape.experts_per_token,
    )


def identity(cfg: CollectConfig, checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the manifest's fields that follow from files and options, not from the model.

    A run that resumes or repeats another must have the same.
    """
    rule = activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    may_change = ("out", "model", "corpus", "device", "device_map", "dry_run")
    return {
        "fingerprint": checkpoint.fingerprint,
        "config": result_fields(checkpoint.config),
        "tokenizer": _tokenizer_id(tokenizer),
        "corpus": cfg.corpus,
        "options": {name: v for name, v in asdict(cfg).items() if name not in may_change},
        "activation": rule.name,
        "activation_threshold": rule.threshold,
    }


def _tokenizer_id(tokenizer: Tokenizer) -> str:
    """Identify a tokenizer: class, vocabulary size, and a checksum of what decides ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        tokenizer.chat_template,
        tokenizer.bos_token_id,
    )
    checksum = xxhash.xxh3_64_hexdigest(json.dumps(parts).encode())
    return f"{type(tokenizer).__name__} {len(tokenizer)} {checksum}"


def finished_store(cfg: CollectConfig, checkpoint: Checkpoint) -> ActivationStore:
    """Open the finished store in `cfg.out`.

    Raises:
        InputError: `cfg` would make another one.
    """
    store = ActivationStore(cfg.out)
    manifest = store.manifest
    now = replace(manifest, **identity(cfg, checkpoint, load_tokenizer(checkpoint)))
    changes = manifest_differences(manifest, now)
    check_unchanged(cfg.out, "a finished store", changes, finished=True)
    tokens = manifest.tokens()
    log.info(f"{cfg.out}: already collected, {tokens:,} tokens; the corpus was not read again")
    return store


def _summarize(manifest: Manifest, out: Path, tally: Tally) -> None:
    """Log the tokens of a finished store, its long documents, and tokens that fell short."""
    parts = ", ".join(f"{name} {manifest.tokens(name):,}" for name in SPLITS)
    log.info(f"{out}: {manifest.tokens():,} tokens ({parts}), {len(manifest.layers)} layers")
    truncated, total = sum(manifest.truncated.values()), sum(manifest.documents.values())
    options = manifest.options
    if truncated and options["long_documents"] == "cut":
        log.info(f"{truncated:,} of {total:,} documents were cut at {options['seq_len']} tokens")
    elif truncated:
        log.info(
            f"{truncated:,} of {total:,} documents are longer than {options['seq_len']} tokens: "
            f"they were read in {tally.windows:,} windows"
        )
    if manifest.tokens() < options["tokens"]:
        log.warning(f"the corpus ran out before {options['tokens']:,} tokens")
