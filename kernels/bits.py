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
    w = tl.arange(0, word_W.shape[0])
    before_W = upto_W - _ones(word_W)
    here_KW = (before_W[None, :] <= k_K[:, None]) & (k_K[:, None] < upto_W[None, :])
    # One sum over the words brings all of it: reductions across a program are what costs here.
    found_KW = ((w << 16) | word_W).to(tl.int64)[None, :] << 32
    found_KW |= (k_K[:, None] - before_W[None, :]).to(tl.int64)
    found_K = tl.sum(tl.where(here_KW, found_KW, 0), 1)
    word_K = (found_K >> 32).to(tl.int32) & 0xFFFF
    upto_bit = (2 << tl.arange(0, 16)) - 1
    passed_K16 = _ones(word_K[:, None] & upto_bit[None, :]) <= found_K.to(tl.int32)[:, None]
    return (found_K >> 48).to(tl.int32) * 16 + tl.sum(passed_K16.to(tl.int32), 1)


@triton.jit
def tile_of(mask, word_W, upto_W, tile, n_words, TILE: tl.constexpr):
    """TILE words of a set: (TILE, 16) neurons, whether they are in the set, and at which place."""
    w = tile * TILE + tl.arange(0, TILE)
    bit = tl.arange(0, 16)
    word = tl.load(mask + w, mask=w < n_words, other=0).to(tl.int32)
    on = (word[:, None] >> bit[None, :]) & 1
    before = tl.sum(tl.where(tl.arange(0, word_W.shape[0]) < tile * TILE, _ones(word_W), 0), 0)
    place = before + tl.reshape(tl.cumsum(tl.reshape(on, (TILE * 16,)), 0), (TILE, 16)) - 1
    return w[:, None] * 16 + bit[None, :], on != 0, place


@triton.jit
def _ones(word):
    """Bits set in each 16-bit word."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F
