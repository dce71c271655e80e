"""Assign documents to train, calibration and held-out (90/5/5) by a hash of their key.

The same document lands in the same split in every run, on every rank and in every corpus that
holds it. A corpus too small for the hash to fill all three splits gives its lowest hash to
held-out and the next to calibration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain

from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import Document

SPLITS = ("train", "calibration", "held-out")
FEW = 100
"""Up to this many keys may leave a split empty and get the rule for small corpora."""
HEAD = 2**27
"""Characters after which a corpus is not small, however few its keys."""


def split_of(key: str) -> str:
    """Return a key's split by its hash alone."""
    place = _place(key)
    return "train" if place < 0.90 else "calibration" if place < 0.95 else "held-out"


def assign_splits(
    docs: Iterable[Document], option: str = "--corpus"
) -> Iterator[tuple[str, Document]]:
    """Pair every document with its split, in order, streaming.

    Args:
        option: The one that names the corpus, for messages.

    Memory: the documents of the first `FEW` keys, at most `HEAD` characters.

    Raises:
        InputError: Fewer than three keys, so three splits cannot be filled.
    """
    stream = iter(docs)
    head: list[Document] = []
    keys: set[str] = set()
    held = 0
    while len(keys) <= FEW and held < HEAD and (doc := next(stream, None)) is not None:
        head.append(doc)
        keys.add(doc.key)
        held += len(doc.text)
    forced = _forced(keys, option) if len(keys) <= FEW and held < HEAD else {}
    for doc in chain(head, stream):
        yield forced.get(doc.key) or split_of(doc.key), doc


def _forced(keys: set[str], option: str) -> dict[str, str]:
    """Assign the keys of a small corpus so that every split gets one."""
    if len(keys) < len(SPLITS):
        raise InputError(
            f"{option}: {len(keys)} different document(s) in it; expected at least {len(SPLITS)}, "
            f"one each for {', '.join(SPLITS)}; give more text"
        )
    natural = {key: split_of(key) for key in keys}
    if set(natural.values()) == set(SPLITS):
        return natural
    order = sorted(keys, key=_place)
    return {key: "train" for key in keys} | {order[0]: "held-out", order[1]: "calibration"}


def _place(key: str) -> float:
    """Hash a key to a number that is uniform in [0, 1)."""
    digest = blake2b(b"split:" + key.encode("utf-8", errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64
