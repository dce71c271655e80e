"""The text that sparsity and perplexity are measured on, taken from as many documents as can be.

Sparsity differs between documents by several points, and a long document has hundreds of windows. A
handful of documents would decide what a target is met on, and elsewhere it is not. So more is read
than is measured, and every document gives as few windows as make the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

from sparsecast.core.text.tokens import Sequence as Tokens

READ = 8
"""Tokens that are read for each one that is measured."""


def few_of_each(rows: Sequence[Tokens], tokens: int) -> list[Tokens]:
    """Return windows that have `tokens` or more, from every document the same small number.

    All rows if they have no more than that. The windows of a document are at equal distances; a
    document with fewer gives all of its own.

    Args:
        rows: The windows of a document one behind the other, as `tokenize_documents` gives them.
    """
    starts = [number for number, row in enumerate(rows) if row.first]
    documents = [rows[begin:end] for begin, end in pairwise([*starts, len(rows)])]

    def some(windows: int) -> list[Tokens]:
        return list(chain.from_iterable(_evenly(document, windows) for document in documents))

    chosen: list[Tokens] = []
    for windows in range(1, max(map(len, documents), default=0) + 1):
        chosen = some(windows)
        if sum(len(row.ids) for row in chosen) >= tokens:
            break
    return chosen


def _evenly(rows: Sequence[Tokens], number: int) -> Iterator[Tokens]:
    """Yield the middle row of each of `number` equal parts, all rows if there are no more."""
    number = min(number, len(rows))
    return (rows[(2 * part + 1) * len(rows) // (2 * number)] for part in range(number))


def spread(rows: Sequence[Tokens], tokens: int) -> Iterator[Tokens]:
    """Yield rows at equal distances in tokens, `tokens` in all or up to one row fewer.

    All of them if they have no more than that. The row that would exceed it is cut.
    """
    total = sum(len(row.ids) for row in rows)
    seen = kept = 0
    for row in rows:
        seen += len(row.ids)
        if kept * max(total, tokens) < tokens * seen and (ids := row.ids[: tokens - kept])[1:]:
            kept += len(ids)
            yield Tokens(row.split, ids, row.truncated or len(ids) < len(row.ids), row.first)
