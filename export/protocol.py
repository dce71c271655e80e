"""The text that verify runs on and the perplexity that PowerInfer's `perplexity` computes.

The binary drops one line break at the end of the file, tokenises with BOS in front, cuts into
chunks of c tokens (the rest is dropped), puts BOS in place of each chunk's first token and scores
positions c/2 to c - 2, each predicting the next token (examples/perplexity/perplexity.cpp).

Shape letters: N chunks, S chunk length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2 as proto
from torch import Tensor

from sparsecast.collect.corpus import documents
from sparsecast.collect.errors import InputError
from sparsecast.collect.splits import assign
from sparsecast.export.reader import GGUFFile

CHUNK = 128
"""The engine's old allocator asserts for some context lengths; 128 is not one of them."""
TOKENS_AT_ONCE = 1024
Logits = Callable[[Tensor], Tensor]


def tokenizer_of(file: GGUFFile) -> Any:
    """A sentencepiece BPE processor made of the vocabulary that stands in the file.

    Merges by best score, leftmost first, with byte fallback and one space put in front: what the
    engine's own tokenizer does.
    """
    model = proto.ModelProto()  # type: ignore[attr-defined]  # made at import
    keys = file.keys
    columns = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for text, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.byte_fallback = spec.BPE, True
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def held_out_text(corpus: str, tokenizer: Any, tokens: int) -> str:
    """Held-out documents joined, enough for `tokens` tokens or two chunks.

    Raises:
        InputError: The held-out split is smaller than two chunks, which the engine refuses.
    """
    parts: list[str] = []
    count = 0
    for split, doc in assign(documents(corpus)):
        if split == "held-out":
            parts.append(doc.text.replace("\0", " "))
            count += len(tokenizer.encode(parts[-1]))
            if count > tokens + CHUNK:
                break
    if count < 2 * CHUNK + 1:
        raise InputError(
            f"{corpus}: gives {count} held-out tokens, expected more than {2 * CHUNK}; give "
            "more text"
        )
    return "\n\n".join(parts)


def chunks_of(text: str, tokenizer: Any, bos: int, tokens: int) -> Tensor:
    """(N, S) int64 ids as the engine's `perplexity` cuts them, BOS first in every row."""
    ids = [bos, *tokenizer.encode(text.removesuffix("\n"))]
    n = min(len(ids), tokens) // CHUNK
    ids_NS = torch.tensor(ids[: n * CHUNK]).view(n, CHUNK)
    ids_NS[:, 0] = bos
    return ids_NS


def perplexity(logits: Logits, ids_NS: Tensor) -> float:
    """exp of the mean NLL over the second half of every chunk; NaN when a logit is NaN.

    Args:
        logits: (N, S) ids to (N, S, V) float32 logits.
    """
    total, count = 0.0, 0
    first = ids_NS.shape[1] // 2
    for ids in torch.split(ids_NS, max(1, TOKENS_AT_ONCE // ids_NS.shape[1])):
        scored = logits(ids)[:, first:-1].flatten(0, 1).double()
        target = ids[:, first + 1 :].flatten()
        total += torch.nn.functional.cross_entropy(scored, target, reduction="sum").item()
        count += target.numel()
    return float(torch.tensor(total / count).exp())
