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
from sparsecast.collect.estimate import check_needs, estimate
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
from sparsecast.core.distributed import DistributedContext, distributed_context
from sparsecast.core.earlier_runs import check_unchanged
from sparsecast.core.errors import InputError
from sparsecast.core.interrupts import stop_on_signal
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint, result_fields
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import check_seq_len, load_model, pick_device, pick_dtype
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.models.shape import model_shape
from sparsecast.core.run_record import begin_run
from sparsecast.core.text.corpus import read_documents, start_reading
from sparsecast.core.text.corpus_files import is_stream, max_tokens
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.splits import SPLITS, assign_splits
from sparsecast.core.text.tokens import split_quotas
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
    with distributed_context() as ranks, stop_on_signal() as stop, ExitStack() as held:
        with ranks.together():
            given = cfg
            cfg = replace(cfg, out=output_folder(cfg.out), device=_device(cfg, ranks))
            checkpoint = Checkpoint(cfg.model)
            if (cfg.out / MANIFEST).is_file():
                return _finished(cfg, checkpoint)
            plan = _plan(cfg, checkpoint, shares, ranks, given)
            if ranks.leads:
                held.enter_context(lock_output(plan.out))
                begin_or_resume(plan.out, plan.manifest)
        plan = plan.with_first_threads()
        with keeping_shards(plan, stop):
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


def _device(cfg: CollectConfig, ranks: DistributedContext) -> str:
    """Return this rank's device."""
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
    wanted = shares or split_quotas(cfg.tokens, cfg.count_tokens)
    activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    dtype = pick_dtype(cfg.dtype, checkpoint.config.dtype, pick_device(cfg.device))
    checkpoint.check()
    outline = empty_model(checkpoint.config)
    shape = _shape(cfg, outline, dtype)
    batch_tokens = min(cfg.batch_size * cfg.seq_len, max(cfg.tokens, cfg.count_tokens))
    largest_shard = max(shape.shard_tokens, batch_tokens)
    most = max_tokens(cfg.corpus, cfg.seq_len)
    there = {split: count if most is None else min(count, most) for split, count in wanted.items()}
    needs = estimate(outline, dtype, shape, there, largest_shard)
    check_needs(cfg.out, needs)
    skipped = SkippedRows(cfg.corpus)
    read = read_documents(
        cfg.corpus, seq_len=cfg.seq_len, long_documents=cfg.long_documents, skipped=skipped
    )
    docs = start_reading(cfg.corpus, assign_splits(read))
    run = begin_run("collect", given, checkpoint=checkpoint, device=pick_device(cfg.device))
    model, tokenizer = load_model(
        cfg.model,
        device=cfg.device,
        dtype=cfg.dtype,
        activation_threshold=cfg.activation_threshold,
        device_map=cfg.device_map,
    )
    check_seq_len(cfg.seq_len, model, cfg.model)
    manifest = _manifest(cfg, checkpoint, model, tokenizer, shape)
    resolved = {"dtype": manifest.dtype, "input_dtype": shape.x_dtype, "layers": manifest.layers}
    return CollectionPlan(
        model=model,
        tokenizer=tokenizer,
        documents=docs,
        quotas=wanted,
        seq_len=cfg.seq_len,
        long_documents=cfg.long_documents,
        skipped=skipped,
        batch_size=cfg.batch_size,
        largest_shard=largest_shard,
        manifest=manifest,
        out=cfg.out,
        store_bytes=needs.store,
        run=run.resolve(**resolved),
        ranks=ranks,
    )


def _shape(cfg: CollectConfig, outline: PreTrainedModel, dtype: torch.dtype) -> Shape:
    """Return the store's shape for a model that computes in `dtype`."""
    sizes = model_shape(outline)
    layers = list(range(sizes.layers)) if cfg.layers is None else cfg.layers
    if out_of_range := [i for i in layers if not 0 <= i < sizes.layers]:
        raise InputError(
            f"--layers: the model has layers 0 to {sizes.layers - 1}, got {out_of_range}"
        )
    if not layers:
        raise InputError(f"--layers: got none, expected some of 0 to {sizes.layers - 1}")
    if cfg.energy and sizes.experts:
        raise InputError(
            f"--energy: {cfg.model} is a mixture of experts, whose energies are not recorded; "
            "leave it out"
        )
    x_dtype: str = cfg.input_dtype
    if x_dtype == "auto":
        x_dtype = "bfloat16" if dtype == torch.bfloat16 else "float16"
    return Shape(
        layers=layers,
        hidden_size=sizes.hidden_size,
        ffn_width=sizes.ffn_width,
        x_dtype=x_dtype,
        energy=cfg.energy,
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
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
        **_identity(cfg, checkpoint, tokenizer),
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


def _identity(cfg: CollectConfig, checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the manifest's fields that follow from files and options, not from the model.

    A run that resumes or repeats another must have the same.
    """
    rule = activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    may_change = ("out", "model", "corpus", "device", "device_map")
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


def _finished(cfg: CollectConfig, checkpoint: Checkpoint) -> ActivationStore:
    """Open the finished store in `cfg.out` if `cfg` would make the same."""
    store = ActivationStore(cfg.out)
    manifest = store.manifest
    now = replace(manifest, **_identity(cfg, checkpoint, load_tokenizer(checkpoint)))
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
