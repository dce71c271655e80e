"""Prepare a run: the model, its tokenizer, and the corpus as tokens."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.memory import check_memory
from sparsecast.core.messages import log
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule
from sparsecast.core.models.loading import build_model, set_activation
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.text.corpus import Document, read_documents
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import TokenBatch, batch_by_length, tokenize_documents
from sparsecast.core.tokenizers.copies import keep_files
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.sparsify.chats import Chats, read_chats
from sparsecast.sparsify.config import Preset
from sparsecast.sparsify.evaluation_text import READ, few_of_each, spread
from sparsecast.sparsify.plan import SPARSE, SparsifyPlan, activation_name
from sparsecast.sparsify.samples import keep_openings
from sparsecast.sparsify.save import (
    check_kept,
    set_config_activation,
    tokenizer_differences,
)
from sparsecast.sparsify.sequences import open_rows, pack_documents, rows_file
from sparsecast.sparsify.train_tokenizer import train_tokenizer
from sparsecast.sparsify.work_folder import WorkFolder

STATE_BYTES = 16
"""Of a parameter in training: float32 weights, gradients and two AdamW moments."""
TOKENIZER_DOCUMENTS = 6_000
EVAL_BATCH = 32
MEASURED = ("calibration", "held-out")
"""Splits that nothing is trained on."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Everything that the phases share; `model` is trained in place, in float32."""

    model: Any
    tokenizer: Tokenizer
    kept: Path
    """Folder with the tokenizer files that go beside the saved model."""
    rule: ActivationRule
    """The activation that replaces the model's own: relu, or drelu if the model has that."""
    rows: Path
    """File of the training sequences, in the work folder."""
    corpus_tokens: int
    """Tokens in it."""
    calibration: list[TokenBatch]
    held_out: list[TokenBatch]
    chats: Chats | None
    """For supervised fine-tuning, if that is planned."""
    openings: list[Document]
    """Beginnings of held-out documents."""

    @property
    def sample_texts(self) -> list[str]:
        """A few held-out documents."""
        return _sample_texts(self.tokenizer, self.held_out)


def _sample_texts(tokenizer: Tokenizer, held_out: list[TokenBatch]) -> list[str]:
    rows = held_out[0].ids_BS[:3]
    return ["".join(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]


def check_fits(plan: SparsifyPlan, work: Path) -> None:
    """Raise `InputError` before anything is read if the device cannot hold this process's share of
    weights, gradients and moments, or the disk the checkpoints.

    Args:
        work: The work folder, whose files need no more room.
    """
    parameters = empty_model(planned_config(plan)).num_parameters()
    state = STATE_BYTES * parameters // plan.team.context.size
    on_cpu = plan.device.type == "cpu"
    check_memory(
        f"{plan.out}: sparsify",
        plan.device,
        host=state if on_cpu else 0,
        on_device=0 if on_cpu else state,
        instead="share it among more processes with torchrun, or start from a smaller model",
    )
    WorkFolder(work).reserve(parameters, plan.phases, 0, plan.dtype.itemsize)


def prepare(plan: SparsifyPlan, work: WorkFolder) -> TrainingSetup:
    """Build or load the model and tokenize the corpus; finished parts are taken from `work`.

    Weights are loaded last, so that every other check fails before that.
    """
    work.needs = 4.0 * plan.tokens
    kept = work.path / "tokenizer"
    if plan.checkpoint is None:
        assert plan.preset is not None
        tokenizer = _train_tokenizer(plan, plan.preset, kept)
        config: Any = preset_config(plan.preset, len(tokenizer), plan.seq_len)
    else:
        assert plan.tokenizer is not None
        tokenizer, config = plan.tokenizer, plan.checkpoint.config
    rule = sparse_rule(config)
    passes = SkippedRows(plan.corpus), SkippedRows(plan.corpus)
    openings: list[Document] = []
    calibration, held_out = _evaluation_batches(
        plan, tokenizer, config.vocab_size, passes[0], openings
    )
    if plan.checkpoint is not None:
        texts = _sample_texts(tokenizer, held_out)
        _keep_tokenizer(plan.checkpoint, tokenizer, rule, kept, texts)
    rows = _training_rows(plan, work, tokenizer, config.vocab_size, passes[1])
    max(passes, key=lambda skipped: skipped.count).tell()
    chats = read_chats(plan, work, tokenizer, config.vocab_size) if plan.sft_steps else None
    nbytes = rows.stat().st_size + sum(held.nbytes for held in chats or ())
    parameters = empty_model(config).num_parameters()
    work.reserve(parameters, plan.phases, nbytes, plan.dtype.itemsize)
    return TrainingSetup(
        model=_load_or_initialize(plan, config).to(plan.device),
        tokenizer=tokenizer,
        kept=kept,
        rule=rule,
        rows=rows,
        corpus_tokens=open_rows(rows, plan.seq_len).size,
        calibration=calibration,
        held_out=held_out,
        chats=chats,
        openings=openings,
    )


def planned_config(plan: SparsifyPlan) -> Any:
    """Return the config of the model to train; of a preset, with the largest vocabulary."""
    if plan.checkpoint is not None:
        return plan.checkpoint.config
    assert plan.preset is not None
    return preset_config(plan.preset, plan.preset.vocab_size, plan.seq_len)


def sparse_rule(config: Any) -> ActivationRule:
    """Return the activation that replaces a model's own."""
    return ActivationRule("drelu" if activation_name(config) == "drelu" else "relu")


def _load_or_initialize(plan: SparsifyPlan, config: Any) -> Any:
    if plan.checkpoint is None:
        torch.manual_seed(plan.seed)
        return LlamaForCausalLM(config)
    model = build_model(plan.checkpoint, torch.float32)
    if activation_name(config) in SPARSE:
        set_activation(model, activation_rule(config, plan.checkpoint.source))
    return model


def _keep_tokenizer(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    rule: ActivationRule,
    kept: Path,
    texts: Iterable[str],
) -> None:
    """Copy the tokenizer's files into the work folder, or check the copy of an earlier start."""
    if (kept / "config.json").is_file():
        copied = load_tokenizer(Checkpoint(str(kept)))
        if changed := tokenizer_differences(tokenizer, copied, texts):
            raise InputError(
                f"{checkpoint.source}: its tokenizer gives {changed} than it did when the run in "
                f"{kept.parent} began; restore it, or remove that folder to begin again"
            )
        return
    keep_files(tokenizer, checkpoint.folder, kept)
    config = copy.deepcopy(checkpoint.config)
    set_config_activation(config, rule if rule.on_up else ActivationRule("fatrelu", 0.5))
    check_kept(tokenizer, config, kept, texts)


def _train_tokenizer(plan: SparsifyPlan, preset: Preset, folder: Path) -> Tokenizer:
    if (folder / "config.json").is_file():
        return load_tokenizer(Checkpoint(str(folder)))
    log.info(f"training a tokenizer of {preset.vocab_size} pieces")
    docs = islice(_train_documents(plan, SkippedRows(plan.corpus)), TOKENIZER_DOCUMENTS)
    tokenizer = train_tokenizer(_texts(docs, plan.corpus), preset.vocab_size, folder)
    preset_config(preset, len(tokenizer), plan.seq_len).save_pretrained(folder)
    return tokenizer


def _texts(docs: Iterable[Document], corpus: str) -> Iterator[str]:
    """Yield the texts; chats are left out, because a new tokenizer has no template for them."""
    chats = texts = 0
    for doc in docs:
        if doc.chat is None:
            texts += 1
            yield doc.text
        else:
            chats += 1
    if not texts:
        raise InputError(
            f"--corpus {corpus}: holds chats alone ({chats:,} of them), and the tokenizer of a "
            "--preset has no template for them; give plain text under 'text', or a --model that "
            "has one"
        )


def preset_config(preset: Preset, vocab_size: int, seq_len: int) -> LlamaConfig:
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


def _evaluation_batches(
    plan: SparsifyPlan,
    tokenizer: Tokenizer,
    vocabulary: int,
    skipped: SkippedRows,
    openings: list[Document],
) -> tuple[list[TokenBatch], list[TokenBatch]]:
    """Return the batches of the calibration split and of the held-out split.

    `openings` gets the beginnings of held-out documents.
    """
    long_documents = plan.long_documents
    docs = read_documents(
        plan.corpus, seq_len=plan.seq_len, long_documents=long_documents, skipped=skipped
    )
    rows = list(
        tokenize_documents(
            keep_openings(assign_splits(docs), openings),
            tokenizer,
            dict.fromkeys(MEASURED, READ * plan.eval_tokens),
            plan.seq_len,
            vocabulary,
            long_documents,
            skipped,
        )
    )
    tokens = plan.eval_tokens
    chosen = chain.from_iterable(
        spread(few_of_each([row for row in rows if row.split == split], tokens), tokens)
        for split in MEASURED
    )
    found = list(batch_by_length(chosen, seq_len=plan.seq_len, batch_size=EVAL_BATCH))
    splits = {batch.split for batch in found}
    if missing := set(MEASURED) - splits:
        raise InputError(
            f"--corpus {plan.corpus}: no document of two tokens or more for "
            f"{' and '.join(sorted(missing))}; give more text, in more documents"
        )
    return (
        [batch for batch in found if batch.split == "calibration"],
        [batch for batch in found if batch.split == "held-out"],
    )


def _training_rows(
    plan: SparsifyPlan,
    work: WorkFolder,
    tokenizer: Tokenizer,
    vocabulary: int,
    skipped: SkippedRows,
) -> Path:
    path = rows_file(work.path, vocabulary)
    if not path.is_file():
        docs = _train_documents(plan, skipped)
        pack_documents(docs, tokenizer, path, plan.seq_len, plan.tokens, vocabulary, skipped)
    return path


def _train_documents(plan: SparsifyPlan, skipped: SkippedRows) -> Iterator[Document]:
    workers = os.cpu_count() or 1
    docs = read_documents(plan.corpus, workers=workers, seq_len=plan.seq_len, skipped=skipped)
    return (doc for name, doc in assign_splits(docs) if name == "train")
