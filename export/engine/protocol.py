"""The text that verify evaluates, and the perplexity as PowerInfer's `perplexity` computes it.

The binary drops one newline at the end of the file, tokenizes with BOS in front, splits into chunks
of c tokens (the remainder is dropped), replaces each chunk's first token by BOS and scores
positions c/2 to c - 2, each predicting the next token (examples/perplexity/perplexity.cpp). With a
gpt2 vocabulary there is no BOS anywhere.

Shape letters: N chunks, S chunk length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.splits import assign_splits
from sparsecast.export.read.vocab import FileVocabulary

CHUNK = 128
"""The engine's allocator fails an assertion for some context lengths, but not for 128."""
TOKENS_AT_ONCE = 1024
Logits = Callable[[Tensor], Tensor]
Encode = Callable[[str], list[int]]


class HeldOutText(NamedTuple):
    """Text that neither training nor calibration has seen, and its tokens."""

    tokenizer: FileVocabulary
    docs: list[str]
    ids_NS: Tensor
    """The documents, joined, in chunks; see `chunks_of`."""
    by_ids: bool = False
    """Whether the engine is given ids: of the text it may make others."""


def read_held_out(
    corpus: str, tokenizer: FileVocabulary, tokens: int, encode: Encode | None = None
) -> HeldOutText:
    """Read and tokenize enough held-out documents for `tokens` tokens or two chunks.

    Args:
        encode: The model's ids of a text where the engine's are others.

    Raises:
        InputError: See `held_out_documents`.
    """
    docs = held_out_documents(corpus, tokenizer, tokens)
    ids_NS = chunks_of(joined(docs), tokenizer, tokens, encode)
    return HeldOutText(tokenizer, docs, ids_NS, encode is not None or tokenizer.bos is None)


def held_out_documents(corpus: str, tokenizer: FileVocabulary, tokens: int) -> list[str]:
    """Read held-out documents, enough for `tokens` tokens or two chunks.

    Raises:
        InputError: The held-out split is smaller than two chunks, which the engine refuses.
    """
    docs: list[str] = []
    count = 0
    skipped = SkippedRows(corpus)
    for split, doc in assign_splits(read_documents(corpus, skipped=skipped)):
        if split == "held-out":
            docs.append(doc.text.replace("\0", " "))
            count += len(tokenizer.encode(docs[-1]))
            if count > tokens + CHUNK:
                break
    skipped.tell()
    if count < 2 * CHUNK + 1:
        raise InputError(
            f"{corpus}: gives {count} held-out tokens, expected more than {2 * CHUNK}; give "
            "more text"
        )
    return docs


def joined(docs: list[str]) -> str:
    """Join documents to the text on which all perplexities are computed."""
    return "\n\n".join(docs)


def chunks_of(
    text: str, tokenizer: FileVocabulary, tokens: int, encode: Encode | None = None
) -> Tensor:
    """Tokenize into chunks, (N, S) int64 ids, as the engine's `perplexity` does.

    Args:
        encode: See `read_held_out`.
    """
    ids = (encode or tokenizer.encode)(text.removesuffix("\n"))
    if tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    n = min(len(ids), tokens) // CHUNK
    ids_NS = torch.tensor(ids[: n * CHUNK]).view(n, CHUNK)
    if tokenizer.bos is not None:
        ids_NS[:, 0] = tokenizer.bos
    return ids_NS


def perplexity(logits: Logits, ids_NS: Tensor) -> float:
    """Return exp of the mean NLL over the second half of every chunk; NaN if a logit is NaN.

    Args:
        logits: Maps (N, S) ids to (N, S, V) float32 logits.
    """
    return float(losses(logits, ids_NS).mean().exp())


def losses(logits: Logits, ids_NS: Tensor) -> Tensor:
    """Return the NLL of each token that `perplexity` scores, (N, S - S / 2 - 1) float64."""
    first, rows = ids_NS.shape[1] // 2, []
    for ids in torch.split(ids_NS, max(1, TOKENS_AT_ONCE // ids_NS.shape[1])):
        scored = logits(ids)[:, first:-1].transpose(1, 2).double()
        target = ids[:, first + 1 :]
        rows.append(torch.nn.functional.cross_entropy(scored, target, reduction="none"))
    return torch.cat(rows)
