"""The stage: a model and a corpus to an activation store.

The folder grows under a hidden name beside its own, with a manifest that says what it will be.
Shards appear in it one by one, each whole; a run that finds some leaves them out. The last act
counts up, completes the manifest and gives the folder its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.config import CollectConfig
from sparsecast.collect.corpus import documents
from sparsecast.collect.errors import InputError
from sparsecast.collect.families import activation_rule, family_of
from sparsecast.collect.fill import Filler
from sparsecast.collect.models import ffn_shape, load_model
from sparsecast.collect.plan import Tally, Unit, units
from sparsecast.collect.prefetch import prefetch
from sparsecast.collect.progress import Bar, bar, console
from sparsecast.collect.ranks import Team, team
from sparsecast.collect.recorder import Recorder
from sparsecast.collect.shard import SHARD_BYTES, Shape
from sparsecast.collect.splits import SPLITS, assign
from sparsecast.collect.stats import STATS, merge, write_stats
from sparsecast.collect.stop import Stop, stoppable
from sparsecast.collect.store import (
    MANIFEST,
    ActivationStore,
    Manifest,
    read_checksum,
    read_manifest,
    read_shard,
    write_manifest,
)
from sparsecast.collect.tokens import quotas, sequences
from sparsecast.collect.writer import Writer, to_folder


def collect(cfg: CollectConfig) -> ActivationStore:
    """Record `cfg.tokens` tokens; a finished store made with the same options is kept.

    Killed at any moment and run again, it ends with the bytes that an uninterrupted run would
    have written. Under torchrun the ranks share the work, and the store is that of one rank.

    Memory beyond the model, whatever `cfg.tokens`: one layer's activations of a batch on the
    device, and on the host 3 shards, each the larger of 128 MiB and what one batch records
    (`cfg.batch_size * cfg.seq_len` tokens of `Shape.token_bytes`, plus energies).

    Raises:
        InputError: See `load_model`, `documents` and `assign`; a layer out of range; a store
            under `cfg.out`, finished or not, that was made with other options; an input that
            does not fit its dtype.
        KeyboardInterrupt: After the batch in hand, at Ctrl-C or SIGTERM.
    """
    checkpoint = Checkpoint(cfg.model)
    if (cfg.out / MANIFEST).is_file():
        return _finished(cfg, checkpoint)
    _refuse_foreign(cfg.out)
    with team() as ranks, stoppable() as stop:
        if ranks.size > 1:
            cfg = _on_its_device(cfg, ranks)
        model, tokenizer = load_model(
            cfg.model,
            device=cfg.device,
            dtype=cfg.dtype,
            activation_threshold=cfg.activation_threshold,
            device_map=cfg.device_map,
        )
        manifest = _describe(cfg, checkpoint, model, tokenizer)
        part = cfg.out.with_name(f".{cfg.out.name}.part")
        with ExitStack() as held:
            if ranks.leads:
                held.enter_context(_locked(cfg.out))
                _open(part, manifest)
            ranks.wait()
            try:
                plan = _record(cfg, model, tokenizer, manifest.shape, part, ranks, stop)
            except KeyboardInterrupt:
                console.print(f"{cfg.out}: stopped; the same command goes on from here")
                raise
            ranks.wait()
            if ranks.leads:
                manifest = _complete(cfg, part, manifest, *plan)
                _summary(manifest, cfg)
            ranks.wait()
    return ActivationStore(cfg.out)


def token_limit(cfg: CollectConfig, shape: Shape) -> tuple[int, int]:
    """(tokens after which a shard is full, tokens of the largest one that may occur)."""
    full = max(1, SHARD_BYTES // shape.token_bytes)
    return full, max(full, cfg.batch_size * cfg.seq_len)


def _record(
    cfg: CollectConfig,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    shape: Shape,
    part: Path,
    ranks: Team,
    stop: Stop,
) -> tuple[list[tuple[str, int, str]], Tally]:
    """Write this rank's share of the shards; (split, tokens, file) of all, and what went in."""
    full, largest = token_limit(cfg, shape)
    tally = Tally()
    wanted = quotas(cfg.tokens, cfg.count_tokens)
    rows = sequences(assign(documents(cfg.corpus)), tokenizer, wanted, cfg.seq_len)
    plan = units(
        tally.over(rows), seq_len=cfg.seq_len, batch_size=cfg.batch_size, shard_tokens=full
    )
    on_gpu = any(weight.is_cuda for weight in model.parameters())
    filler = Filler(model, shape)
    shards = []
    with (
        Writer(shape, shape.nbytes(largest), to_folder(part), pinned=on_gpu) as writer,
        bar("collect", cfg.tokens + cfg.count_tokens, visible=ranks.leads) as progress,
        torch.inference_mode(),
    ):
        for number, unit in enumerate(prefetch(plan)):
            shards.append((unit.split, unit.tokens, unit.name))
            stop.check()
            if number % ranks.size != ranks.rank:
                progress.advance(unit.tokens)
            elif (part / unit.name).is_file():
                _check_same(unit, part / unit.name, cfg)
                progress.advance(unit.tokens)
            else:
                image = writer.image()
                filler.begin(unit, image)
                _forward(model, filler, unit, stop, progress)
                writer.submit(filler.end())
    return shards, tally


def _forward(model: PreTrainedModel, filler: Filler, unit: Unit, stop: Stop, progress: Bar) -> None:
    device = input_device(model)
    with Recorder(model, filler, filler.layers):
        for batch in unit.batches:
            stop.check()
            filler.batch(batch)
            # Right padding: causal attention needs no mask to keep it out of real tokens.
            model.base_model(batch.to(device).ids_BS, use_cache=False)
            progress.advance(batch.tokens)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go, also in a model that is spread over devices."""
    return next((w.device for w in model.parameters() if not w.is_meta), torch.device("cpu"))


def _on_its_device(cfg: CollectConfig, ranks: Team) -> CollectConfig:
    if cfg.corpus == "-":
        raise InputError(
            f"--corpus -: {ranks.size} ranks cannot share one standard input; save it to a file"
        )
    if cfg.device_map is not None:
        raise InputError(
            f"--device-map {cfg.device_map}: spreads one copy of the model over every device, but "
            f"{ranks.size} ranks want a copy each; use it without torchrun"
        )
    if cfg.device in ("auto", "cuda") and torch.cuda.is_available():
        return replace(cfg, device=f"cuda:{ranks.local_rank % torch.cuda.device_count()}")
    return cfg


def _describe(
    cfg: CollectConfig, checkpoint: Checkpoint, model: PreTrainedModel, tokenizer: Tokenizer
) -> Manifest:
    """The manifest before any token is recorded."""
    n_layers, hidden_size, ffn_width = ffn_shape(model)
    layers = list(range(n_layers)) if cfg.layers is None else sorted(set(cfg.layers))
    if out := [i for i in layers if not 0 <= i < n_layers]:
        raise InputError(f"--layers: the model has layers 0 to {n_layers - 1}, got {out}")
    if not layers:
        raise InputError(f"--layers: got none, expected some of 0 to {n_layers - 1}")
    family = family_of(checkpoint.config, cfg.model)
    rule = activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    x_dtype = cfg.input_dtype
    if x_dtype == "auto":
        x_dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float16"
    text = tokenizer.backend_tokenizer.to_str().encode()
    return Manifest(
        model=cfg.model,
        fingerprint=checkpoint.fingerprint,
        model_type=checkpoint.config.model_type,
        tokenizer=f"{type(tokenizer).__name__} {len(tokenizer)} {xxhash.xxh3_64_hexdigest(text)}",
        convention=family.convention,
        activation=rule.name,
        activation_threshold=rule.threshold,
        corpus=cfg.corpus,
        options=_options(cfg),
        layers=layers,
        hidden_size=hidden_size,
        ffn_width=ffn_width,
        ffn_matrices=family.matrices,
        x_dtype=x_dtype,
        energy=cfg.energy,
    )


def _options(cfg: CollectConfig) -> dict[str, Any]:
    """What a resumed run must share; where it runs is free to change."""
    free = ("out", "model", "corpus", "device", "device_map")
    return {name: value for name, value in asdict(cfg).items() if name not in free}


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder to write; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(
            f"{out}: exists and holds other files, expected a new or empty folder; choose "
            "another --out or remove it"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second collection out of the same folder."""
    path = out.with_name(f".{out.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{out}: another collection is writing it; wait for that one, or choose another --out"
        ) from error
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error}); choose another --out") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _open(part: Path, manifest: Manifest) -> None:
    """Make the unfinished folder, or accept the one an interrupted run has left."""
    if (part / MANIFEST).is_file():
        before = read_manifest(part)
        changed = _differences(before, manifest)
        if changed:
            raise InputError(
                f"{part}: holds an unfinished collection made differently ({'; '.join(changed)}); "
                "repeat the options it was started with, or remove that folder"
            )
        for leftover in part.glob("*.part"):
            leftover.unlink()
        done = sum(1 for _ in part.glob("*-*.safetensors"))
        console.print(f"resuming: {done} finished shards are kept")
        return
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_manifest(part, manifest)


def _differences(made: Manifest, asked: Manifest) -> list[str]:
    """What two manifests disagree on, counts apart."""
    changed = []
    if made.fingerprint != asked.fingerprint:
        changed.append("the model's weights differ")
    pairs = {
        "corpus": (made.corpus, asked.corpus),
        "tokenizer": (made.tokenizer, asked.tokenizer),
        "input dtype": (made.x_dtype, asked.x_dtype),
        "activation threshold": (made.activation_threshold, asked.activation_threshold),
        "activation": (made.activation, asked.activation),
        **{
            name: (made.options.get(name), asked.options.get(name))
            for name in sorted({*made.options, *asked.options})
        },
    }
    changed += [f"{name} was {a!r}, now {b!r}" for name, (a, b) in pairs.items() if a != b]
    return changed


def _check_same(unit: Unit, path: Path, cfg: CollectConfig) -> None:
    """A kept shard must hold the tokens that the plan wants there."""
    found = read_shard(path)["id"]
    if not torch.equal(found, unit.ids()):
        raise InputError(
            f"{path}: holds other tokens than {cfg.corpus} has there now; the corpus has changed "
            "since the collection began: restore it, or remove the folder to begin again"
        )


def _complete(
    cfg: CollectConfig,
    part: Path,
    manifest: Manifest,
    shards: list[tuple[str, int, str]],
    tally: Tally,
) -> Manifest:
    """Count up, complete the manifest and give the folder its name."""
    tokens: dict[str, list[int]] = {name: [] for name in SPLITS}
    for split, count, _ in shards:
        tokens.setdefault(split, []).append(count)
    if short := [name for name in SPLITS if not tokens[name]]:
        shutil.rmtree(part)
        raise InputError(
            f"{cfg.corpus}: no token for {' and '.join(short)}; give more text, in more files"
        )
    counts = ((split, read_shard(part / name)) for split, _, name in shards)
    write_stats(part / STATS, merge(counts, manifest.layers, manifest.ffn_width))
    done = replace(
        manifest,
        shard_tokens=tokens,
        checksums={name: read_checksum(part / name) for _, _, name in sorted(shards)},
        documents=tally.documents,
        truncated=tally.truncated,
    )
    write_manifest(part, done)
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
        corpus=cfg.corpus,
        options=_options(cfg),
        activation=rule.name,
        activation_threshold=rule.threshold,
    )
    if changed := _differences(made, asked):
        raise InputError(
            f"{cfg.out}: holds a finished store made differently ({'; '.join(changed)}); choose "
            "another --out or remove the folder"
        )
    console.print(f"{cfg.out}: already collected, {store.manifest.tokens():,} tokens")
    return store


def _summary(manifest: Manifest, cfg: CollectConfig) -> None:
    parts = ", ".join(f"{name} {manifest.tokens(name):,}" for name in SPLITS)
    console.print(
        f"{cfg.out}: {manifest.tokens():,} tokens ({parts}), {len(manifest.layers)} layers",
        soft_wrap=True,
    )
    cut, whole = sum(manifest.truncated.values()), sum(manifest.documents.values())
    if cut:
        console.print(f"{cut:,} of {whole:,} documents were cut at {cfg.seq_len} tokens")
    if manifest.tokens() < cfg.tokens:
        console.print(f"the corpus ran out before {cfg.tokens:,} tokens", style="yellow")
