"""Translate the engine server's next-token distributions to token ids.

The server names tokens by text, and several tokens may share a text: the k-th entry of a text in
its list is taken as the k-th most probable of our tokens with that text.

Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.engine.process import Next


class Reply(NamedTuple):
    """One next-token distribution of the engine."""

    tokens: list[int]
    """Tokens with the text of the engine's most probable one."""
    slots: Tensor
    """For each probability, its index in `Spelling.distribution`."""
    probs: Tensor
    unknown_text: bool
    """Whether the reply names a text that no remaining token has."""
    banned: bool
    """The most probable token was unsayable; this is the distribution without such tokens."""

    def probability(self, token: int) -> Tensor:
        """Probability of a token with a unique text, in float64; 0 if it is not named."""
        return self.probs[self.slots == token].sum(dtype=torch.float64)

    def distance(self, other: Reply) -> float:
        """Largest difference of a probability; one that a reply does not name counts as 0."""
        size = 1 + int(torch.cat([self.slots, other.slots, torch.zeros(1).long()]).max())
        ours, theirs = (
            torch.zeros(size, dtype=torch.float64).index_put_((r.slots,), r.probs)
            for r in (self, other)
        )
        return (ours - theirs).abs().max().item()


class Spelling:
    """Maps the server's texts to token ids; tokens that share a text are ordered by probability.

    Args:
        texts: Text of every token, as the server prints it.
        excluded: Tokens left out of every distribution.
    """

    def __init__(self, texts: list[str], excluded: list[int]) -> None:
        self.texts = texts
        self.excluded = excluded
        unsayable = {i for i, text in enumerate(texts) if not text or text.startswith("byte: \\x")}
        self.unsayable = sorted(unsayable - set(excluded))
        """Tokens whose probabilities the server drops: part of a character, or no text."""
        self._members: dict[str, list[int]] = defaultdict(list)
        for i, text in enumerate(texts):
            self._members[text].append(i)
        self._shared = [torch.tensor(ids) for ids in self._members.values() if len(ids) > 1]

    def translate(self, reply: Next) -> Reply:
        """Translate a reply to token ids."""
        used: dict[str, int] = defaultdict(int)
        slots, probs, unknown_text = [], [], False
        for text, prob in reply.probs:
            ids, k = self._members.get(text, []), used[text]
            used[text] += 1
            unknown_text |= k >= len(ids)
            if k < len(ids):
                slots.append(ids[k])
                probs.append(prob)
        tokens = self.unsayable if reply.banned else self._members.get(reply.token, [])
        return Reply(
            tokens,
            torch.tensor(slots, dtype=torch.long),
            torch.tensor(probs, dtype=torch.float64),
            unknown_text,
            reply.banned,
        )

    def distribution(self, logits_V: Tensor, *, banned: bool = False) -> Tensor:
        """Return (V,) float64 probabilities without `excluded`; those of one text in falling order.

        Args:
            banned: Also leave out the `unsayable` tokens.
        """
        out = [*self.excluded, *(self.unsayable if banned else [])]
        probs_V = logits_V.double().index_fill(0, torch.tensor(out), float("-inf")).softmax(-1)
        for ids in self._shared:
            probs_V[ids] = probs_V[ids].sort(descending=True).values
        return probs_V

    def compare(
        self, reply: Reply, logits_V: Tensor, probs_V: Tensor | None = None
    ) -> tuple[float, float]:
        """Compare a reply with our logits.

        Args:
            probs_V: Their `distribution`, where it is at hand.

        Returns:
            How far our logit of the engine's token is below our best, and the largest difference
            of a probability.
        """
        said_V = logits_V.index_fill(0, torch.tensor(self.excluded), float("-inf"))
        theirs = said_V[reply.tokens].max().item() if reply.tokens else float("-inf")
        gap = said_V.max().item() - theirs
        if reply.unknown_text:
            return gap, 1.0
        ours_V = probs_V
        if ours_V is None or reply.banned:
            ours_V = self.distribution(logits_V, banned=reply.banned)
        return gap, (ours_V[reply.slots] - reply.probs).abs().max().item()
