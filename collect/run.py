"""The stage: a model and a corpus to an activation store.

The folder grows under a hidden name beside its own, with a manifest that says what it will be.
Shards appear in it one by one, each whole; a run that finds some leaves them out. The last act
counts up, completes the manifest and gives the folder its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.estimate import layers_of, look, x_dtype_of
from sparsecast.collect.resume import begin, differences, locked, shards, target, unfinished
from sparsecast.collect.store.filler import Filler, down_norms
from sparsecast.collect.store.firing import Silent, check_firing
from sparsecast.collect.store.shard import SHARD_BYTES, Shape
from sparsecast.collect.store.shard_reader import ShardFile
from sparsecast.collect.store.store import (
    ActivationStore,
    Manifest,
    read_manifest,
    seal,
)
from sparsecast.collect.store.units import ShardInfo, Tally, Unit, units
from sparsecast.collect.store.writer import Writer, record_unit, to_folder
from sparsecast.core.disk import full_disk, no_room, told_when_full
from sparsecast.core.distributed import DistributedContext, team
from sparsecast.core.errors import InputError
from sparsecast.core.interrupts import Stop, same_kind, stoppable
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint, effective
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import check_length, embedding_rows, ffn_shape, load_model
from sparsecast.core.models.recorder import Recorder
from sparsecast.core.prefetch import prefetch
from sparsecast.core.progress import Bar, bar
from sparsecast.core.text.corpus import Document, begun, documents
from sparsecast.core.text.corpus_files import is_stream
from sparsecast.core.text.splits import SPLITS, assign
from sparsecast.core.text.tokens import TokenBatch, quotas, sequences
from sparsecast.core.tokenizers.loading import load_tokenizer


def collect(cfg: CollectConfig, shares: Mapping[str, int] | None = None) -> ActivationStore:
    """Record `cfg.tokens` tokens; a finished store made with the same options is kept.

    Killed at any moment and run again on the machine, it ends with the bytes that an uninterrupted
    run would have written. Under torchrun the ranks share the work, and the store is that of one
    rank: the same tokens in the same shards, and the same bytes at the same number of CPU threads,
    which torchrun sets to 1.

    Args:
        shares: Tokens per split, instead of 90/5/5 of `cfg.tokens`.

    Memory beyond the model, whatever `cfg.tokens`: one layer's activations of a batch on the
    device; on the host 3 shards, each the larger of 128 MiB and what one batch records
    (`cfg.batch_size * cfg.seq_len` tokens of `Shape.token_bytes`, plus energies), the token ids
    of a few shards, and the head of the corpus that `assign` holds.

    Raises:
        InputError: See `load_model`, `documents` and `assign`; a layer out of range; a store
            under `cfg.out`, finished or not, that was made with other options; an input that
            does not fit its dtype.
        KeyboardInterrupt: After the batch in hand, at Ctrl-C or SIGTERM.
    """
    with team() as ranks, stoppable() as stop, ExitStack() as held:
        with ranks.together():
            cfg = _on_its_device(replace(cfg, out=target(cfg.out)), ranks)
            checkpoint = Checkpoint(cfg.model)
            if (cfg.out / MANIFEST).is_file():
                return _finished(cfg, checkpoint)
            wanted = shares or quotas(cfg.tokens, cfg.count_tokens)
            need = look(cfg, checkpoint, wanted, token_limit)
            docs = begun(cfg.corpus, assign(documents(cfg.corpus, seq_len=cfg.seq_len)))
            model, tokenizer = load_model(
                cfg.model,
                device=cfg.device,
                dtype=cfg.dtype,
                activation_threshold=cfg.activation_threshold,
                device_map=cfg.device_map,
            )
            manifest = _describe(cfg, checkpoint, model, tokenizer)
            if ranks.leads:
                held.enter_context(locked(cfg.out))
                begin(cfg.out, manifest)
        part = unfinished(cfg.out)
        manifest = replace(manifest, threads=read_manifest(part).threads)
        with _saying_what_is_kept(cfg, need, ranks, stop), _threads(manifest.threads):
            plan = _record(cfg, model, tokenizer, docs, wanted, manifest.shape, part, ranks, stop)
        ranks.wait()
        if ranks.leads:
            all_of_them = "every shard is kept: make room, and the same command goes on from there"
            with told_when_full(cfg.out, need, "the store", lambda: all_of_them):
                manifest = _complete(cfg, part, manifest, *plan)
            _summary(manifest, cfg)
        ranks.wait()
    return ActivationStore(cfg.out)


@contextmanager
def _saying_what_is_kept(
    cfg: CollectConfig, need: int, ranks: DistributedContext, stop: Stop
) -> Iterator[None]:
    """Where recording ends early: clear up what is of no use, and say what is kept."""
    part = unfinished(cfg.out)
    fresh = not shards(part)
    try:
        yield
    except BaseException as error:
        kept = len(shards(part))
        if ranks.leads and (not kept or (fresh and isinstance(error, Silent))):
            shutil.rmtree(part, ignore_errors=True)
        told = _told(error, cfg, need, kept, stop.terminated and ranks.size > 1)
        if told is error:
            raise
        raise told from None if isinstance(error, KeyboardInterrupt) else error


def _told(
    error: BaseException, cfg: CollectConfig, need: int, kept: int, torn: bool
) -> BaseException:
    """What to raise where recording ended with `kept` finished shards; `torn`: by another rank."""
    left = (
        f"{kept} finished shards are kept, the same command goes on from there"
        if kept
        else "no shard was finished yet, nothing is left behind"
    )
    if no_room(error) is not None:
        return full_disk(error, cfg.out, need, "the store", left)
    if isinstance(error, OSError):
        return OSError(f"{error.filename or cfg.out}: {error.strerror or error}; {left}")
    if not isinstance(error, KeyboardInterrupt):
        return error
    how = (
        "stopped by SIGTERM, as torchrun does when a rank fails: what that one says comes first"
        if torn
        else "interrupted"
    )
    return same_kind(error, f"{cfg.out}: {how}; {left}")


def token_limit(cfg: CollectConfig, shape: Shape) -> tuple[int, int]:
    """(tokens after which a shard is full, tokens of the largest one that may occur)."""
    full = max(1, SHARD_BYTES // shape.token_bytes)
    batch = min(cfg.batch_size * cfg.seq_len, max(cfg.tokens, cfg.count_tokens))
    return full, max(full, batch)


def _record(
    cfg: CollectConfig,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    docs: Iterable[tuple[str, Document]],
    wanted: Mapping[str, int],
    shape: Shape,
    part: Path,
    ranks: DistributedContext,
    stop: Stop,
) -> tuple[list[ShardInfo], Tally]:
    """Write this rank's share of the shards; all shards, and the documents in them."""
    full, largest = token_limit(cfg, shape)
    tally = Tally()
    rows = sequences(
        stop.until(docs), tokenizer, wanted, cfg.seq_len, vocabulary=embedding_rows(model)
    )
    plan = units(
        tally.over(rows), seq_len=cfg.seq_len, batch_size=cfg.batch_size, shard_tokens=full
    )
    on_gpu = any(weight.is_cuda for weight in model.parameters())
    filler = Filler(shape, down_norms(model, shape))
    forward = partial(_forward, model, stop)
    planned = []
    with (
        Writer(shape, shape.nbytes(largest), to_folder(part), pinned=on_gpu) as writer,
        bar("collect", sum(wanted.values()), visible=ranks.leads) as progress,
        torch.inference_mode(),
        Recorder(model, filler, filler.layers),
    ):
        for number, unit in enumerate(prefetch(plan, waiting=stop.check)):
            planned.append(unit.info)
            stop.check()
            if number % ranks.size != ranks.rank or _kept(unit, part / unit.info.name, cfg, shape):
                progress.advance(unit.tokens)
            else:
                record_unit(filler, writer, unit, partial(forward, progress))
        stop.check()
    return planned, tally


def _forward(model: PreTrainedModel, stop: Stop, progress: Bar, batch: TokenBatch) -> None:
    stop.check()
    # Right padding: causal attention needs no mask to keep it out of real tokens.
    model.base_model(batch.to(input_device(model)).ids_BS, use_cache=False)
    progress.advance(batch.tokens)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go, also in a model that is spread over devices."""
    return next((w.device for w in model.parameters() if not w.is_meta), torch.device("cpu"))


def _on_its_device(cfg: CollectConfig, ranks: DistributedContext) -> CollectConfig:
    if ranks.size == 1:
        return cfg
    if is_stream(cfg.corpus):
        raise InputError(
            f"--corpus {cfg.corpus}: {ranks.size} ranks cannot share one stream; save it to a file"
        )
    if cfg.device_map is not None:
        raise InputError(
            f"--device-map {cfg.device_map}: spreads one copy of the model over every device, but "
            f"{ranks.size} ranks want a copy each; use it without torchrun"
        )
    return replace(cfg, device=ranks.device(cfg.device))


def _describe(
    cfg: CollectConfig, checkpoint: Checkpoint, model: PreTrainedModel, tokenizer: Tokenizer
) -> Manifest:
    """The manifest before any token is recorded."""
    n_layers, hidden_size, ffn_width = ffn_shape(model)
    check_length(cfg.seq_len, model, cfg.model)
    family = family_of(checkpoint.config, cfg.model)
    rule = activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    return Manifest(
        model=cfg.model,
        fingerprint=checkpoint.fingerprint,
        model_type=checkpoint.config.model_type,
        config=effective(checkpoint.config),
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        tokenizer=_name_of(tokenizer),
        convention=family.convention,
        activation=rule.name,
        activation_threshold=rule.threshold,
        corpus=cfg.corpus,
        options=_options(cfg),
        layers=layers_of(cfg, n_layers),
        hidden_size=hidden_size,
        ffn_width=ffn_width,
        ffn_matrices=family.matrices,
        x_dtype=x_dtype_of(cfg, model.dtype),
        energy=cfg.energy,
    )


def _options(cfg: CollectConfig) -> dict[str, Any]:
    """What a resumed run must share; where it runs is free to change."""
    free = ("out", "model", "corpus", "device", "device_map")
    return {name: value for name, value in asdict(cfg).items() if name not in free}


def _name_of(tokenizer: Tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        tokenizer.chat_template,
        tokenizer.bos_token_id,
    )
    checksum = xxhash.xxh3_64_hexdigest(json.dumps(parts).encode())
    return f"{type(tokenizer).__name__} {len(tokenizer)} {checksum}"


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """CPU threads for a block: sums in another number of parts round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kept(unit: Unit, path: Path, cfg: CollectConfig, shape: Shape) -> bool:
    """Whether an earlier run has left this shard, whole and with the tokens wanted there."""
    if not path.is_file():
        return False
    try:
        tensors = ShardFile(path)
        tensors.check()
        tokens = len(tensors.get("id", ()))
        if what := shape.misfit(tensors.header.fields, tokens, stored=unit.stored):
            raise InputError(f"{path}: damaged header, {what}")
    except InputError as error:
        log.warning(f"{error}; recorded again")
        return False
    if not torch.equal(tensors["id"], unit.ids()):
        raise InputError(
            f"{path}: holds other tokens than {cfg.corpus} has there now; the corpus has changed "
            f"since the collection began: restore it, or remove {path.parent} to begin again"
        )
    return True


def _complete(
    cfg: CollectConfig,
    part: Path,
    manifest: Manifest,
    planned: list[ShardInfo],
    tally: Tally,
) -> Manifest:
    """Count up, complete the manifest and give the folder its name."""
    if short := [name for name in SPLITS if not any(shard.split == name for shard in planned)]:
        shutil.rmtree(part)
        raise InputError(
            f"{cfg.corpus}: no token for {' and '.join(short)}; give more text, in more files"
        )
    names = {shard.name for shard in planned}
    for leftover in shards(part):
        if leftover.name not in names:
            leftover.unlink()
    done = seal(
        part, replace(manifest, documents=tally.documents, truncated=tally.truncated), planned
    )
    try:
        check_firing(ActivationStore(part).stats(), done.layers, cfg.model)
    except Silent:
        shutil.rmtree(part)
        raise
    if cfg.out.is_dir():
        cfg.out.rmdir()
    os.replace(part, cfg.out)
    return done


def _finished(cfg: CollectConfig, checkpoint: Checkpoint) -> ActivationStore:
    store = ActivationStore(cfg.out)
    made = store.manifest
    rule = activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    asked = replace(
        made,
        fingerprint=checkpoint.fingerprint,
        config=effective(checkpoint.config),
        tokenizer=_name_of(load_tokenizer(checkpoint)),
        corpus=cfg.corpus,
        options=_options(cfg),
        activation=rule.name,
        activation_threshold=rule.threshold,
    )
    if changed := differences(made, asked):
        raise InputError(
            f"{cfg.out}: holds a finished store made differently ({'; '.join(changed)}); choose "
            "another --out or remove the folder"
        )
    log.info(
        f"{cfg.out}: already collected, {made.tokens():,} tokens; the corpus was not read again"
    )
    return store


def _summary(manifest: Manifest, cfg: CollectConfig) -> None:
    parts = ", ".join(f"{name} {manifest.tokens(name):,}" for name in SPLITS)
    log.info(f"{cfg.out}: {manifest.tokens():,} tokens ({parts}), {len(manifest.layers)} layers")
    cut, whole = sum(manifest.truncated.values()), sum(manifest.documents.values())
    if cut:
        log.info(f"{cut:,} of {whole:,} documents were cut at {cfg.seq_len} tokens")
    if manifest.tokens() < cfg.tokens:
        log.warning(f"the corpus ran out before {cfg.tokens:,} tokens")
