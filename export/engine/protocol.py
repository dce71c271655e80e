"""The text that verify runs on and the perplexity that PowerInfer's `perplexity` computes.

The binary drops one line break at the end of the file, tokenizes with BOS in front, cuts into
chunks of c tokens (the rest is dropped), puts BOS in place of each chunk's first token and scores
positions c/2 to c - 2, each predicting the next token (examples/perplexity/perplexity.cpp). With a
gpt2 vocabulary there is no BOS anywhere.

Shape letters: N chunks, S chunk length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.splits import assign_splits
from sparsecast.export.read.vocab import FileVocabulary

CHUNK = 128
"""The engine's old allocator asserts for some context lengths; 128 is not one of them."""
TOKENS_AT_ONCE = 1024
Logits = Callable[[Tensor], Tensor]


def held_out_documents(corpus: str, tokenizer: FileVocabulary, tokens: int) -> list[str]:
    """Held-out documents, enough for `tokens` tokens or two chunks.

    Raises:
        InputError: The held-out split is smaller than two chunks, which the engine refuses.
    """
    docs: list[str] = []
    count = 0
    for split, doc in assign_splits(read_documents(corpus)):
        if split == "held-out":
            docs.append(doc.text.replace("\0", " "))
            count += len(tokenizer.encode(docs[-1]))
            if count > tokens + CHUNK:
                break
    if count < 2 * CHUNK + 1:
        raise InputError(
            f"{corpus}: gives {count} held-out tokens, expected more than {2 * CHUNK}; give "
            "more text"
        )
    return docs


def joined(docs: list[str]) -> str:
    """The text that all perplexities are taken on."""
    return "\n\n".join(docs)


def chunks_of(text: str, tokenizer: FileVocabulary, tokens: int) -> Tensor:
    """(N, S) int64 ids as the engine's `perplexity` cuts them."""
    ids = tokenizer.encode(text.removesuffix("\n"))
    if tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    n = min(len(ids), tokens) // CHUNK
    ids_NS = torch.tensor(ids[: n * CHUNK]).view(n, CHUNK)
    if tokenizer.bos is not None:
        ids_NS[:, 0] = tokenizer.bos
    return ids_NS


def perplexity(logits: Logits, ids_NS: Tensor) -> float:
    """exp of the mean NLL over the second half of every chunk; NaN when a logit is NaN.

    Args:
        logits: (N, S) ids to (N, S, V) float32 logits.
    """
    return float(losses(logits, ids_NS).mean().exp())


def losses(logits: Logits, ids_NS: Tensor) -> Tensor:
    """(N, S - S / 2 - 1) float64: the NLL of each token that `perplexity` scores."""
    first, rows = ids_NS.shape[1] // 2, []
    for ids in torch.split(ids_NS, max(1, TOKENS_AT_ONCE // ids_NS.shape[1])):
        scored = logits(ids)[:, first:-1].transpose(1, 2).double()
        target = ids[:, first + 1 :]
        rows.append(torch.nn.functional.cross_entropy(scored, target, reduction="none"))
    return torch.cat(rows)
