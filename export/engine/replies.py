"""What the engine's server says of a next token, in our token ids.

It names tokens by text, and several may share one: the k-th of a text in its list is taken for the
k-th most probable of ours with that text.

Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.engine.process import Next


class Reply(NamedTuple):
    """One distribution of the engine's."""

    tokens: list[int]
    """Ours with the text of its most probable one."""
    slots: Tensor
    """Of each probability: the place of its token in `Vocabulary.by_text`."""
    probs: Tensor
    strangers: bool
    """It names a text that none of ours has left."""
    banned: bool
    """The most probable token cannot be said; this is the distribution without those."""

    def probability(self, token: int) -> Tensor:
        """Of a token that shares its text with no other, in float64; 0 where it is not named."""
        return self.probs[self.slots == token].sum(dtype=torch.float64)


class Spelling:
    """The texts of a file's tokens, and places for them in which the order of equals is settled.

    Args:
        texts: Of every token, as the server prints it.
        excluded: Left out of every distribution.
    """

    def __init__(self, texts: list[str], excluded: list[int]) -> None:
        self.texts = texts
        self.excluded = excluded
        unsayable = {i for i, text in enumerate(texts) if not text or text.startswith("byte: \\x")}
        self.unsayable = sorted(unsayable - set(excluded))
        """Tokens whose probabilities the server drops: half a character, or no text at all."""
        self._members: dict[str, list[int]] = defaultdict(list)
        for i, text in enumerate(texts):
            self._members[text].append(i)
        self._shared = [torch.tensor(ids) for ids in self._members.values() if len(ids) > 1]

    def read(self, reply: Next) -> Reply:
        """The engine's answer with our ids for its texts."""
        used: dict[str, int] = defaultdict(int)
        slots, probs, strangers = [], [], False
        for text, prob in reply.probs:
            ids, k = self._members.get(text, []), used[text]
            used[text] += 1
            strangers |= k >= len(ids)
            if k < len(ids):
                slots.append(ids[k])
                probs.append(prob)
        tokens = self.unsayable if reply.banned else self._members.get(reply.token, [])
        return Reply(
            tokens,
            torch.tensor(slots, dtype=torch.long),
            torch.tensor(probs, dtype=torch.float64),
            strangers,
            reply.banned,
        )

    def distribution(self, logits_V: Tensor, *, banned: bool = False) -> Tensor:
        """(V,) float64 probabilities without `excluded`; those of one text stand in falling order.

        Args:
            banned: Also without what cannot be said.
        """
        out = [*self.excluded, *(self.unsayable if banned else [])]
        probs_V = logits_V.double().index_fill(0, torch.tensor(out), float("-inf")).softmax(-1)
        for ids in self._shared:
            probs_V[ids] = probs_V[ids].sort(descending=True).values
        return probs_V

    def compare(self, reply: Reply, logits_V: Tensor) -> tuple[float, float]:
        """(how far our logit of the engine's token is below our best, largest difference of a
        probability)."""
        said_V = logits_V.index_fill(0, torch.tensor(self.excluded), float("-inf"))
        theirs = said_V[reply.tokens].max().item() if reply.tokens else float("-inf")
        gap = said_V.max().item() - theirs
        if reply.strangers:
            return gap, 1.0
        ours_V = self.distribution(logits_V, banned=reply.banned)
        return gap, (ours_V[reply.slots] - reply.probs).abs().max().item()
