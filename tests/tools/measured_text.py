"""The held-out batches that sparsify measures on, put together again from the corpus."""

from __future__ import annotations

from typing import Any

from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import TokenBatch, batch_by_length, tokenize_documents
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.evaluation_text import READ, few_of_each, spread


def held_out_batches(cfg: SparsifyConfig, tokenizer: Any) -> list[TokenBatch]:
    docs = assign_splits(read_documents(cfg.corpus, seq_len=cfg.seq_len, long_documents="split"))
    quota = {"held-out": READ * cfg.eval_tokens}
    rows = tokenize_documents(docs, tokenizer, quota, cfg.seq_len, long_documents="split")
    chosen = spread(few_of_each(list(rows), cfg.eval_tokens), cfg.eval_tokens)
    return list(batch_by_length(chosen, seq_len=cfg.seq_len, batch_size=32))
