"""What training starts from: a model, its tokenizer, and the corpus as tokens."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.files import hidden_sibling
from sparsecast.core.messages import log
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import (
    build_model,
    check_seq_len,
    open_model,
    pick_device,
    set_activation,
)
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.text.corpus import Document, read_documents
from sparsecast.core.text.corpus_files import is_stream
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import TokenBatch, token_batches
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.sparsify.config import PRESETS, Preset, SparsifyConfig
from sparsecast.sparsify.save import (
    check_kept,
    keep_files,
    set_config_activation,
    tokenizer_differences,
)
from sparsecast.sparsify.sequences import pack_documents
from sparsecast.sparsify.train_tokenizer import train_tokenizer
from sparsecast.sparsify.work_folder import Work

TOKENIZER_DOCUMENTS = 6_000
SPARSE = ("relu", "fatrelu", "drelu")

Opened = tuple[Checkpoint, Tokenizer]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Everything the phases share; `model` is trained in place, in float32."""

    model: Any
    tokenizer: Tokenizer
    kept: Path
    """What of the tokenizer's files goes beside the saved model."""
    rule: ActivationRule
    """What takes the place of the model's own activation: relu, or drelu where it has that."""
    rows_NS: Tensor
    calibration: list[TokenBatch]
    held_out: list[TokenBatch]
    device: torch.device

    @property
    def texts(self) -> list[str]:
        """The beginnings of a few held-out documents."""
        return _beginnings(self.tokenizer, self.held_out)


def _beginnings(tokenizer: Tokenizer, held_out: list[TokenBatch]) -> list[str]:
    rows = held_out[0].ids_BS[:3]
    return ["".join(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]


def open_source(cfg: SparsifyConfig) -> Opened | None:
    """Everything that can be refused before a corpus is read; None for a preset."""
    pick_device(cfg.device)
    if is_stream(cfg.corpus):
        raise InputError(
            f"--corpus {cfg.corpus}: sparsify reads its corpus more than once, expected one that "
            "can be; save it to a file"
        )
    if cfg.model is None:
        return None
    checkpoint, tokenizer = open_model(cfg.model)
    check_seq_len(cfg.seq_len, empty_model(checkpoint.config), cfg.model)
    if _name(checkpoint.config) in SPARSE:
        activation_rule(checkpoint.config, cfg.model)
    return checkpoint, tokenizer


def prepare(cfg: SparsifyConfig, opened: Opened | None, work: Work) -> Start:
    """Make or load the model and tokenize the corpus; finished parts are taken from `work`.

    The weights come last: whatever can be refused without them is refused sooner.
    """
    device = pick_device(cfg.device)
    work.needs = 4.0 * cfg.steps * cfg.step_tokens
    kept = work.path / "tokenizer"
    tokenizer = _train_tokenizer(cfg, kept) if opened is None else opened[1]
    if opened is None:
        assert cfg.preset is not None
        config: Any = _config(PRESETS[cfg.preset], len(tokenizer), cfg.seq_len)
    else:
        config = opened[0].config
    rule = ActivationRule("drelu" if _name(config) == "drelu" else "relu")
    calibration, held_out = _evaluation(cfg, tokenizer, config.vocab_size)
    if opened is not None:
        _keep(opened, rule, kept, _beginnings(tokenizer, held_out))
    rows_NS = _rows(cfg, work, tokenizer, config.vocab_size)
    work.reserve(empty_model(config).num_parameters(), cfg.phases, rows_NS.numel())
    if opened is None:
        torch.manual_seed(cfg.seed)
        model: Any = LlamaForCausalLM(config)
    else:
        model = build_model(opened[0], torch.float32)
        if _name(config) in SPARSE:
            set_activation(model, activation_rule(config, opened[0].source))
    return Start(
        model=model.to(device),
        tokenizer=tokenizer,
        kept=kept,
        rule=rule,
        rows_NS=rows_NS.to(device),
        calibration=calibration,
        held_out=held_out,
        device=device,
    )


def _name(config: PreTrainedConfig) -> Any:
    """Of the activation that the model comes with."""
    return getattr(config, family_of(config, "model").act_key, None)


def _keep(opened: Opened, rule: ActivationRule, kept: Path, texts: Iterable[str]) -> None:
    """Put the tokenizer's files aside, or find those that this run has put aside before."""
    checkpoint, tokenizer = opened
    if (kept / "config.json").is_file():
        if changed := tokenizer_differences(
            tokenizer, load_tokenizer(Checkpoint(str(kept))), texts
        ):
            raise InputError(
                f"{checkpoint.source}: its tokenizer gives {changed} than it did when the run in "
                f"{kept.parent} began; restore it, or remove that folder to begin again"
            )
        return
    keep_files(tokenizer, checkpoint.folder, kept)
    config = copy.deepcopy(checkpoint.config)
    set_config_activation(config, rule if rule.on_up else ActivationRule("fatrelu", 0.5))
    check_kept(tokenizer, config, kept, texts)


def _train_tokenizer(cfg: SparsifyConfig, folder: Path) -> Tokenizer:
    assert cfg.preset is not None
    preset = PRESETS[cfg.preset]
    if (folder / "config.json").is_file():
        return load_tokenizer(Checkpoint(str(folder)))
    log.info(f"training a tokenizer of {preset.vocab_size} pieces")
    docs = islice(_train_documents(cfg), TOKENIZER_DOCUMENTS)
    tokenizer = train_tokenizer(_texts(docs, cfg.corpus), preset.vocab_size, folder)
    _config(preset, len(tokenizer), cfg.seq_len).save_pretrained(folder)
    return tokenizer


def _texts(docs: Iterable[Document], corpus: str) -> Iterator[str]:
    for doc in docs:
        if doc.chat is not None:
            raise InputError(
                f"--corpus {corpus}: holds chats, and the tokenizer of a --preset has no template "
                "for them; give plain text under 'text', or a --model that has one"
            )
        yield doc.text


def _config(preset: Preset, vocab_size: int, seq_len: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=preset.hidden_size,
        intermediate_size=preset.ffn_width,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def _evaluation(
    cfg: SparsifyConfig, tokenizer: Tokenizer, vocabulary: int
) -> tuple[list[TokenBatch], list[TokenBatch]]:
    """The batches of the calibration and of the held-out split."""
    found = list(
        token_batches(
            assign_splits(read_documents(cfg.corpus, seq_len=cfg.seq_len)),
            tokenizer,
            {"calibration": cfg.eval_tokens, "held-out": cfg.eval_tokens},
            seq_len=cfg.seq_len,
            batch_size=32,
            vocabulary=vocabulary,
        )
    )
    splits = {batch.split for batch in found}
    if missing := {"calibration", "held-out"} - splits:
        raise InputError(
            f"--corpus {cfg.corpus}: no document of two tokens or more for "
            f"{' and '.join(sorted(missing))}; give more text, in more documents"
        )
    return (
        [batch for batch in found if batch.split == "calibration"],
        [batch for batch in found if batch.split == "held-out"],
    )


def _rows(cfg: SparsifyConfig, work: Work, tokenizer: Tokenizer, vocabulary: int) -> Tensor:
    path = work.path / "tokens.safetensors"
    if path.is_file():
        return load_file(path)["rows"]
    limit = cfg.steps * cfg.step_tokens
    rows_NS = pack_documents(_train_documents(cfg), tokenizer, cfg.seq_len, limit, vocabulary)
    part = hidden_sibling(path, "part")
    save_file({"rows": rows_NS}, part)
    part.replace(path)
    return rows_NS


def _train_documents(cfg: SparsifyConfig) -> Iterator[Document]:
    docs = assign_splits(
        read_documents(cfg.corpus, workers=os.cpu_count() or 1, seq_len=cfg.seq_len)
    )
    return (doc for name, doc in docs if name == "train")
