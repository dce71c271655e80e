"""What training starts from: a model, its tokenizer, and the corpus as tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.corpus import documents
from sparsecast.collect.families import family_of
from sparsecast.collect.models import pick_device, read_weights
from sparsecast.collect.pretrained import tokenizer_of
from sparsecast.collect.progress import console
from sparsecast.collect.splits import assign
from sparsecast.collect.tokenizers import load_tokenizer
from sparsecast.collect.tokens import TokenBatch, batches
from sparsecast.sparsify.config import PRESETS, Preset, SparsifyConfig
from sparsecast.sparsify.text import sequences
from sparsecast.sparsify.tokenizer import train_tokenizer

TOKENIZER_DOCUMENTS = 6_000


@dataclass(frozen=True, kw_only=True)
class Start:
    """Everything the phases share; `model` is trained in place, in float32."""

    model: Any
    tokenizer: Tokenizer
    tokenizer_files: list[Path]
    rows_NS: Tensor
    calibration: list[TokenBatch]
    held_out: list[TokenBatch]
    device: torch.device
    steps: int
    pretrain_steps: int
    lr: float
    l1: float


def prepare(cfg: SparsifyConfig, work: Path) -> Start:
    """Load or make the model and tokenise the corpus; finished parts are taken from `work`."""
    device = pick_device(cfg.device)
    preset = PRESETS[cfg.preset] if cfg.preset else None
    if preset is not None:
        source = _tokenizer_folder(cfg, work, preset)
        tokenizer: Tokenizer = tokenizer_of(source)
        model = _new_model(preset, len(tokenizer), cfg.seq_len)
    else:
        assert cfg.model is not None
        checkpoint = Checkpoint(cfg.model)
        family_of(checkpoint.config, cfg.model)
        source, tokenizer = checkpoint.folder, load_tokenizer(checkpoint)
        model = read_weights(checkpoint, torch.float32)
    tokens = cfg.tokens or (preset.tokens if preset else 100_000_000)
    steps = max(10, tokens // cfg.batch_tokens)
    rows_NS = _rows(cfg, work, tokenizer, tokens)
    evaluation = list(
        batches(
            assign(documents(cfg.corpus, seq_len=cfg.seq_len)),
            tokenizer,
            {"calibration": cfg.eval_tokens, "held-out": cfg.eval_tokens},
            seq_len=cfg.seq_len,
            batch_size=32,
        )
    )
    return Start(
        model=model.to(device),
        tokenizer=tokenizer,
        tokenizer_files=sorted(source.glob("tokenizer*")),
        rows_NS=rows_NS.to(device),
        calibration=[batch for batch in evaluation if batch.split == "calibration"],
        held_out=[batch for batch in evaluation if batch.split == "held-out"],
        device=device,
        steps=steps,
        pretrain_steps=int(steps * cfg.pretrain_share) if preset else 0,
        lr=cfg.lr or (preset.lr if preset else 3e-5),
        l1=(preset.l1 if preset else 0.1) if cfg.l1 is None else cfg.l1,
    )


def _tokenizer_folder(cfg: SparsifyConfig, work: Path, preset: Preset) -> Path:
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        console.print(f"training a tokenizer of {preset.vocab_size} pieces")
        train_tokenizer(
            islice(_train_texts(cfg.corpus, cfg.seq_len), TOKENIZER_DOCUMENTS),
            preset.vocab_size,
            folder,
        )
    return folder


def _new_model(preset: Preset, vocab_size: int, seq_len: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
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
    )


def _rows(cfg: SparsifyConfig, work: Path, tokenizer: Tokenizer, limit: int) -> Tensor:
    path = work / "tokens.safetensors"
    if path.is_file():
        return load_file(path)["rows"]
    rows_NS = sequences(_train_texts(cfg.corpus, cfg.seq_len), tokenizer, cfg.seq_len, limit)
    part = path.with_suffix(".part")
    save_file({"rows": rows_NS}, part)
    part.replace(path)
    return rows_NS


def _train_texts(corpus: str, seq_len: int) -> Iterator[str]:
    docs = assign(documents(corpus, workers=os.cpu_count() or 1, seq_len=seq_len))
    return (doc.text for name, doc in docs if name == "train")
