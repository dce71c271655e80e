"""The stage: a model and a corpus to an activation store."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from sparsecast.collect.atomic import new_folder
from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.config import CollectConfig
from sparsecast.collect.corpus import documents
from sparsecast.collect.errors import InputError
from sparsecast.collect.families import activation_rule, family_of
from sparsecast.collect.models import ffn_shape, load_model
from sparsecast.collect.progress import bar, console
from sparsecast.collect.recorder import Recorder
from sparsecast.collect.splits import SPLITS, assign
from sparsecast.collect.store import (
    MANIFEST,
    ActivationStore,
    Manifest,
    Writer,
    write_manifest,
)
from sparsecast.collect.tokens import batches, quotas


def collect(cfg: CollectConfig) -> ActivationStore:
    """Record `cfg.tokens` tokens; a finished store made with the same options is kept.

    Memory beyond the model: the activations of one batch and at most 3 shards of 128 MiB.

    Raises:
        InputError: See `load_model`, `documents` and `assign`; a layer out of range; a store
            under `cfg.out` that was made with other options.
    """
    checkpoint = Checkpoint(cfg.model)
    options = {k: v for k, v in asdict(cfg).items() if k not in ("out", "model", "corpus")}
    if (cfg.out / MANIFEST).is_file():
        return _finished(cfg, options, checkpoint.fingerprint)

    model, tokenizer = load_model(
        cfg.model,
        device=cfg.device,
        dtype=cfg.dtype,
        activation_threshold=cfg.activation_threshold,
    )
    n_layers, hidden_size, ffn_width = ffn_shape(model)
    layers = list(range(n_layers)) if cfg.layers is None else sorted(set(cfg.layers))
    if out := [i for i in layers if not 0 <= i < n_layers]:
        raise InputError(f"--layers: the model has layers 0 to {n_layers - 1}, got {out}")
    x_dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    stream = batches(
        assign(documents(cfg.corpus)),
        tokenizer,
        quotas(cfg.tokens),
        seq_len=cfg.seq_len,
        batch_size=cfg.batch_size,
    )
    n_documents = dict.fromkeys(SPLITS, 0)
    with new_folder(cfg.out) as folder, torch.inference_mode():
        writer = Writer(folder, layers, x_dtype)
        with (
            Recorder(model, writer.add, layers) as recorder,
            bar("collect", cfg.tokens) as progress,
        ):
            for cpu_batch in stream:
                batch = cpu_batch.to(model.device)
                writer.begin(batch.split, _positions(cpu_batch.keep_BS))
                recorder.keep(batch.keep_BS)
                # Right padding: causal attention needs no mask to keep it out of real tokens.
                model.base_model(batch.ids_BS, use_cache=False)
                n_documents[batch.split] += len(batch.ids_BS)
                progress.advance(batch.tokens)
        writer.close()
        rule = activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
        manifest = Manifest(
            model=cfg.model,
            fingerprint=checkpoint.fingerprint,
            model_type=checkpoint.config.model_type,
            convention=family_of(checkpoint.config, cfg.model).convention,
            activation=rule.name,
            activation_threshold=rule.threshold,
            corpus=cfg.corpus,
            options=options,
            layers=layers,
            hidden_size=hidden_size,
            ffn_width=ffn_width,
            ffn_matrices=3,
            x_dtype=str(x_dtype).removeprefix("torch."),
            shard_tokens=writer.shard_tokens,
            documents=n_documents,
        )
        if short := [name for name in SPLITS if not manifest.tokens(name)]:
            raise InputError(
                f"{cfg.corpus}: no token for {' and '.join(short)}; give more text, in more files"
            )
        write_manifest(folder, manifest)
    _summary(manifest, cfg)
    return ActivationStore(cfg.out)


def _positions(keep_BS: Tensor) -> Tensor:
    places = torch.arange(keep_BS.shape[1]).expand(keep_BS.shape)
    return places[keep_BS]


def _finished(cfg: CollectConfig, options: dict[str, object], fingerprint: str) -> ActivationStore:
    store = ActivationStore(cfg.out)
    made = {**store.manifest.options, "corpus": store.manifest.corpus}
    asked = {**options, "corpus": cfg.corpus}
    changed = [f"{k} was {made.get(k)!r}, now {v!r}" for k, v in asked.items() if made.get(k) != v]
    if store.manifest.fingerprint != fingerprint:
        changed.append("the model's weights differ")
    if changed:
        raise InputError(
            f"{cfg.out}: holds a finished store made differently ({'; '.join(changed)}); choose "
            "another --out or remove the folder"
        )
    console.print(f"{cfg.out}: already collected, {store.manifest.tokens():,} tokens")
    return store


def _summary(manifest: Manifest, cfg: CollectConfig) -> None:
    parts = ", ".join(f"{name} {manifest.tokens(name):,}" for name in SPLITS)
    console.print(
        f"{cfg.out}: {manifest.tokens():,} tokens ({parts}), {len(manifest.layers)} layers"
    )
    if manifest.tokens() < cfg.tokens:
        console.print(f"the corpus ran out before {cfg.tokens:,} tokens", style="yellow")
