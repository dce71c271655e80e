"""The text that sparsity and perplexity are measured on, taken from many documents.

Sparsity differs between documents by several points, and a long document has many windows. The
first tokens of a split may come from a handful of documents, on which a target is met and elsewhere
is not. So more is read than is measured, and windows are taken from all of it at equal distances.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparsecast.core.text.tokens import Sequence as Tokens

READ = 8
"""Tokens that are read for each one that is measured."""


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
