"""Token rows with one BOS: cut to the model's length behind it, and checked before the model.

A row is what one forward pass reads of one request, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsecast.core.errors import InputError


def cut_behind_bos(ids: list[int], room: int, bos: int | None) -> list[int]:
    """Return at most `room` of the last ids, BOS in front if `ids` begin with it.

    Raises:
        InputError: No room for a single id.
    """
    if room < 1:
        raise InputError(
            "a request of a task has an answer longer than the model can read; leave the task out"
        )
    if len(ids) <= room:
        return ids
    if bos is None or ids[0] != bos:
        return ids[-room:]
    return [bos, *ids[len(ids) - room + 1 :]]


def check_row(ids: Sequence[int], bos: int | None, *, inside: bool = False) -> None:
    """Make sure that a row has exactly one BOS, in front, if the tokenizer has one at all.

    Args:
        inside: A chat template may write further ones between turns, though not as second token.

    Raises:
        AssertionError: It has none, or another; a mistake of this package.
    """
    if bos is None:
        return
    rest = list(ids[1:2] if inside else ids[1:])
    if not ids or ids[0] != bos or bos in rest:
        raise AssertionError(
            f"a row of token ids must begin with one BOS ({bos}) and hold no other, got "
            f"{list(ids[:8])}"
        )
