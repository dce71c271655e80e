"""The chats of supervised fine-tuning: read, packed into rows, drawn in batches, and scored.

A row holds whole chats, one behind the other, and ends with the beginning of the next, without
loss; that chat stands whole in the next row. So there is no padding, which would count in the L1
term's mean; every answer is trained on once per epoch, behind the whole of its chat so far.

Shape letters: N rows, B rows of a batch, S sequence; 2 is ids and labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import check_file, hidden_sibling
from sparsecast.core.messages import log
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.rows import UnusableRowError
from sparsecast.core.text.skipped import GIVE_UP, SkippedRows
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import check_ids
from sparsecast.sparsify.answers import IGNORED, label_answers
from sparsecast.sparsify.plan import SparsifyPlan
from sparsecast.sparsify.sequences import places
from sparsecast.sparsify.work_folder import WorkFolder

SCORED_ROWS = 16
"""Rows of a forward pass that scores answers."""


class Chats(NamedTuple):
    """Chats as int32 on the CPU."""

    train_N2S: Tensor
    held_out_N2S: Tensor
    """One chat a row; the rest of the row is without loss."""


def read_chats(plan: SparsifyPlan, work: WorkFolder, tokenizer: Any, vocabulary: int) -> Chats:
    """Read `plan.sft_corpus`, or take what an earlier start has read.

    Args:
        vocabulary: Rows of the model's embedding.

    Raises:
        InputError: No chat with an answer in a split, or a token without a row in the embedding.
    """
    path = work.path / "chats.safetensors"
    if path.is_file():
        return read_kept(path, plan.seq_len)
    found = _labelled(plan, tokenizer, vocabulary)
    chats = Chats(
        train_N2S=pack_chats(found["train"], plan.seq_len),
        held_out_N2S=torch.stack([_row([chat], chat, plan.seq_len) for chat in found["held-out"]]),
    )
    part = hidden_sibling(path, "part")
    save_file(chats._asdict(), part)
    part.replace(path)
    passes = plan.sft_steps * plan.batch_size / len(chats.train_N2S)
    if passes > 1:
        log.info(f"{plan.sft_corpus}: the chats are trained on {passes:.1f} times")
    return chats


def read_kept(path: Path, seq_len: int) -> Chats:
    """Read the chats that an earlier start has kept.

    Raises:
        InputError: They are damaged.
    """
    check_file(path, "the chats of an unfinished run")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: damaged ({reason_of(error)}); remove {path.parent}, and the run begins again"
        ) from error
    if found.keys() != set(Chats._fields) or not all(
        chats.dtype == torch.int32 and len(chats) and chats.shape[1:] == (2, seq_len)
        for chats in found.values()
    ):
        raise InputError(
            f"{path}: holds no chats of {seq_len} tokens; remove {path.parent}, and the run begins "
            "again"
        )
    return Chats(**found)


def _labelled(plan: SparsifyPlan, tokenizer: Any, vocabulary: int) -> dict[str, list[Tensor]]:
    """Return the (2, n) chats of the splits for training and for scores, as many as are needed."""
    assert plan.sft_corpus is not None
    left = {"train": plan.sft_tokens, "held-out": plan.eval_tokens}
    found: dict[str, list[Tensor]] = {split: [] for split in left}
    skipped = SkippedRows(plan.sft_corpus)
    docs = assign_splits(read_documents(plan.sft_corpus, skipped=skipped), "--sft-corpus")
    with progress_bar("tokenize chats", None) as progress:
        for split, doc in docs:
            if left.get(split, 0) <= 0:
                if max(left.values()) <= 0:
                    break
                continue
            try:
                chat_2n = label_answers(tokenizer, doc, plan.seq_len)
            except UnusableRowError as error:
                skipped.add(doc.where, error)
                if skipped.count >= GIVE_UP and not any(found.values()):
                    break
                continue
            check_ids(chat_2n[0].tolist(), tokenizer, vocabulary)
            found[split].append(chat_2n)
            left[split] -= chat_2n.shape[1]
            progress.advance()
    if missing := [split for split, chats in found.items() if not chats]:
        first = f" ({skipped.first[0]})" if skipped.first else ""
        raise InputError(
            f"--sft-corpus {plan.sft_corpus}: no chat for {' and '.join(missing)}{first}; expected "
            "rows with 'messages' or 'conversations' in which the assistant answers"
        )
    skipped.tell()
    return found


def pack_chats(chats: Sequence[Tensor], seq_len: int) -> Tensor:
    """Pack (2, n) chats of at most `seq_len` tokens into (N, 2, S) rows, see above.

    The last row is filled from the first chat.
    """
    rows, held, room = [], list[Tensor](), seq_len
    for chat_2n in chats:
        if chat_2n.shape[1] > room:
            rows.append(_row(held, chat_2n, seq_len))
            held, room = [], seq_len
        held.append(chat_2n)
        room -= chat_2n.shape[1]
    return torch.stack([*rows, _row(held, chats[0], seq_len)])


def _row(chats: Sequence[Tensor], filler_2n: Tensor, seq_len: int) -> Tensor:
    """Put chats into one row and fill it with another's ids, over and over, without loss."""
    room = seq_len - sum(chat.shape[1] for chat in chats)
    fill_2n = filler_2n.repeat(1, -(-room // filler_2n.shape[1]))[:, :room]
    fill_2n[1] = IGNORED
    return torch.cat([*chats, fill_2n], dim=1)


class AnswerBatches(torch.utils.data.IterableDataset[Any]):
    """Endless batches of (B, S) int64 ids and labels, in the order of `Batches`."""

    def __init__(self, rows_N2S: Tensor, batch_size: int, seed: int, first: int = 0) -> None:
        self._rows_N2S = rows_N2S
        self._choice = batch_size, seed, first
        self._part = 0, 1

    def take_part(self, rank: int, size: int) -> None:
        """Yield the sequences of one of `size` processes, a divisor of the batch size."""
        self._part = rank, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index_B in places(len(self._rows_N2S), *self._choice, *self._part):
            ids_BS, labels_BS = self._rows_N2S[index_B].long().unbind(1)
            yield ids_BS, labels_BS


@torch.inference_mode()
def answer_perplexity(model: Any, rows_N2S: Tensor) -> float:
    """Return exp of the mean NLL of all answers' tokens, in float32."""
    nll, answered = 0.0, 0
    for both_B2S in torch.split(rows_N2S, SCORED_ROWS):
        ids_BS, labels_BS = both_B2S.long().to(model.device).unbind(1)
        logits = model(ids_BS, use_cache=False).logits[:, :-1]
        keep = labels_BS[:, 1:] != IGNORED
        target = labels_BS[:, 1:][keep]
        loss = nn.functional.cross_entropy(logits[keep].float(), target, reduction="sum")
        nll += loss.item()
        answered += len(target)
    return math.exp(nll / answered)
