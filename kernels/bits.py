"""A set of neurons as bits, and the way from the k-th of them to its number, inside a kernel.

Whoever decides writes 16 neurons as one word, without knowing what other programs found. Whoever
reads a set counts the bits of all words (F / 8 bytes, from the L2) and finds the k-th bit. So rows
come in the order of their neurons, whatever order programs ran in, and nothing needs to be zeroed
or compacted in between.

Shape letters: N neurons of a tile, W words of 16 neurons, K places in the set.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 16


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
def read_set(mask, n_words, WORDS: tl.constexpr):
    """The words of a set and, inclusive, how many of its neurons lie up to each."""
    w = tl.arange(0, WORDS)
    word_W = tl.load(mask + w, mask=w < n_words, other=0).to(tl.int32) & 0xFFFF
    return word_W, tl.cumsum(_ones(word_W), 0)


@triton.jit
def kth(word_W, upto_W, k_K):
    """(K,) int32: the neurons at the places `k_K` of a set; nonsense beyond its end."""
    WORDS: tl.constexpr = word_W.shape[0]
    before_KW = upto_W[None, :] <= k_K[:, None]
    w_K = tl.sum(before_KW.to(tl.int32), 1)
    skipped_K = tl.max(tl.where(before_KW, upto_W[None, :], 0), 1)
    here_KW = tl.arange(0, WORDS)[None, :] == w_K[:, None]
    word_K = tl.sum(tl.where(here_KW, word_W[None, :], 0), 1)
    upto_bit = (2 << tl.arange(0, 16)) - 1
    below_K16 = _ones(word_K[:, None] & upto_bit[None, :]) <= (k_K - skipped_K)[:, None]
    return w_K * 16 + tl.sum(below_K16.to(tl.int32), 1)


@triton.jit
def _ones(word):
    """Bits set in each 16-bit word."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F
