"""A set of neurons as bits, inside a kernel.

Whoever decides writes 16 neurons as one word, without knowing what other programs found. Whoever
reads the set takes a word, and counts the bits of the words before it (F / 8 bytes, from the L2) to
know its place in a list. So lists are in the order of their neurons, whatever order programs ran
in, and nothing needs to be locked or compacted in between.

Shape letters: N neurons of a tile, W words of 16 neurons, K neurons of a word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 16
MAX_WIDTH = 65535 * WORD
"""Neurons of an FFN, whose words a grid's second dimension counts."""


def reference(mask_W: Tensor, width: int) -> Tensor:
    """The (width,) bools of a set, from its words."""
    bit = torch.arange(WORD, device=mask_W.device)
    return ((mask_W[:, None].int() >> bit) & 1).flatten()[:width].bool()


@triton.jit
def words(on_N):
    """(N / 16,) int16 from N flags, the first neuron in the lowest bit."""
    on_W16 = tl.reshape(on_N.to(tl.int32), (on_N.shape[0] // 16, 16))
    return tl.sum(on_W16 << tl.arange(0, 16)[None, :], 1).to(tl.int16)


@triton.jit
def words_before(mask, w, WORDS: tl.constexpr):
    """(WORDS,) int32: the words before word w, then zeros; WORDS is a power of two above w."""
    other_W = tl.arange(0, WORDS)
    return tl.load(mask + other_W, mask=other_W < w, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def kth_ones(word, k_K):
    """(K,) int32: the places of a word's k-th ones, counted from 0; 16 where there are fewer."""
    upto_16 = (2 << tl.arange(0, 16)) - 1
    return tl.sum((ones(word & upto_16)[None, :] <= k_K[:, None]).to(tl.int32), 1)


@triton.jit
def ones(word):
    """Bits set in each 16-bit word."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F
