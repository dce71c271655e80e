"""Token ids of texts of any length, and windows of them.

Tokenizers are called with at most `PART` characters at once, so a text of a gigabyte needs the
memory of a part. Parts end where the ids of the text before are those with and without the text
behind, which is tried on `LEAD` characters of each: at a line end, else a space, else anywhere. The
next part is tokenized behind the `LEAD` characters before it, whose ids are then dropped, so that
its first token is not that of a text's start. Joined, the ids are those of the whole text, unless
there is no such place, as in a long run of one letter; there a part ends after `PART` characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

PART = 2**18
"""Characters."""
LEAD = 2**10
TRIED = 32
"""Places that are tried as the end of a part, from the last one backwards."""
_LINES = re.compile(r"\n(?=\S)")
_SPACES = re.compile(r"(?<=\S)(?=[ \t])")


def ids_by_parts(ids_of: Callable[[str], list[int]], text: str) -> Iterator[list[int]]:
    """Yield the token ids of a text, part by part.

    Args:
        ids_of: Tokenizes a text, without special tokens at its ends.
    """
    start, lead = 0, 0
    while len(text) - start > PART:
        end, joins = _end_of_part(ids_of, text, start)
        yield _ids_behind(ids_of, text, start, lead, end)
        start, lead = end, min(LEAD, end) if joins else 0
    yield _ids_behind(ids_of, text, start, lead, len(text))


def _ids_behind(
    ids_of: Callable[[str], list[int]], text: str, start: int, lead: int, end: int
) -> list[int]:
    """Return the ids of text[start:end] behind `lead` characters."""
    known = len(ids_of(text[start - lead : start])) if lead else 0
    return ids_of(text[start - lead : end])[known:]


def _end_of_part(ids_of: Callable[[str], list[int]], text: str, start: int) -> tuple[int, bool]:
    """Return the end of the part that begins at `start`, and whether tokens end there as well."""
    low, high = start + PART // 2, start + PART
    lines, spaces = (
        [match.end() for match in pattern.finditer(text, low, high)][-TRIED:]
        for pattern in (_LINES, _SPACES)
    )
    anywhere = range(max(low, high - TRIED) + 1, high + 1)
    for place in (*reversed(lines), *reversed(spaces), *reversed(anywhere)):
        behind = max(0, place - LEAD)
        before = ids_of(text[behind:place])
        if ids_of(text[behind : place + LEAD])[: len(before)] == before:
            return place, True
    return high, False


def windows(
    parts: Iterable[list[int]], first: list[int], seq_len: int
) -> Iterator[tuple[list[int], bool]]:
    """Cut ids into windows of `seq_len`, each behind the ids `first`.

    Yields:
        A window, and whether another one follows. Only the last may be shorter. There is always
        one, however few the ids.
    """
    room = seq_len - len(first)
    held: list[int] = []
    for part in parts:
        held += part
        start = 0
        while len(held) - start > room:
            yield [*first, *held[start : start + room]], True
            start += room
        del held[:start]
    yield [*first, *held], False
