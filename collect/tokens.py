"""Documents to padded token batches.

Every document starts with exactly one BOS where the tokenizer has one (its absence is the classic
cause of abnormal activations in these models) and is truncated to the sequence length.

Shape letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.corpus import Document


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences of one split, padded on the right."""

    split: str
    ids_BS: Tensor
    """int64."""
    keep_BS: Tensor
    """Bool; False is padding."""

    @property
    def tokens(self) -> int:
        return int(self.keep_BS.sum())

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(self.split, self.ids_BS.to(device), self.keep_BS.to(device))


def encode(tokenizer: Tokenizer, text: str, seq_len: int) -> list[int]:
    """Token ids with one BOS in front, at most `seq_len` of them.

    A literal `<s>` in the text is text, not a second BOS.
    """
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids = plain["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    return list(ids[:seq_len])


def quotas(tokens: int) -> dict[str, int]:
    """Share `tokens` out over the splits, 90/5/5."""
    small = max(1, round(0.05 * tokens))
    return {"train": max(1, tokens - 2 * small), "calibration": small, "held-out": small}


def batches(
    docs: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    quota: Mapping[str, int],
    *,
    seq_len: int,
    batch_size: int,
) -> Iterator[TokenBatch]:
    """Group documents of one split into batches, in corpus order, until every quota is met.

    Args:
        docs: (split, document) pairs, as `splits.assign` gives them.
        quota: Split to the number of tokens wanted from it; the document that would exceed it is
            cut. Splits that are not named are skipped.

    Batches are padded to their longest sequence. Documents that give fewer than two tokens are
    dropped, as nothing can be predicted from them.
    """
    left = dict(quota)
    waiting: dict[str, list[list[int]]] = {}
    for split, doc in docs:
        if left.get(split, 0) < 1:
            if not any(left.values()):
                break
            continue
        ids = encode(tokenizer, doc.text, min(seq_len, left[split]))
        if len(ids) < 2 <= left[split]:
            continue
        left[split] -= len(ids)
        rows = waiting.setdefault(split, [])
        rows.append(ids)
        if len(rows) == batch_size:
            yield _pad(split, waiting.pop(split))
    for split, rows in waiting.items():
        yield _pad(split, rows)


def _pad(split: str, rows: list[list[int]]) -> TokenBatch:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    keep = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        keep[i, : len(row)] = True
    return TokenBatch(split, ids, keep)
