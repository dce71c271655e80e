"""A set of neurons as a bit mask, inside a kernel.

The selecting kernel sets one bit per neuron, 16 to a word, and needs nothing from other programs.
A reader takes one word and counts the bits of the words before it (F / 8 bytes, from the L2); that
is the place of the word's neurons in the list. So lists are in the order of the neurons whatever
order programs run in, without locks and without a pass that compacts them.

Shape letters: N neurons of a tile, W words of 16 neurons, K neurons of a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.kernels.ops.compiler import tl, triton

WORD = 16
MAX_WIDTH = 65535 * WORD
"""Largest FFN width: the second dimension of a grid counts its words."""


def reference(mask_W: Tensor, width: int) -> Tensor:
    """Return the set as (width,) bools."""
    bit = torch.arange(WORD, device=mask_W.device)
    return ((mask_W[:, None].int() >> bit) & 1).flatten()[:width].bool()


@triton.jit
def pack(on_N):
    """Pack N flags into (N / 16,) int16, the first neuron in the lowest bit."""
    on_W16 = tl.reshape(on_N.to(tl.int32), (on_N.shape[0] // 16, 16))
    return tl.sum(on_W16 << tl.arange(0, 16)[None, :], 1).to(tl.int16)


@triton.jit
def words_before(mask, w, WORDS: tl.constexpr):
    """Load the words before word w, then zeros, (WORDS,) int32; WORDS is a power of two above w."""
    other_W = tl.arange(0, WORDS)
    return tl.load(mask + other_W, mask=other_W < w, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def kth_bit(word, k_K):
    """Return the positions of a word's k-th set bits, (K,) int32; k counts from 0, and the position
    is 16 where fewer bits are set."""
    upto_16 = (2 << tl.arange(0, 16)) - 1
    return tl.sum((popcount(word & upto_16)[None, :] <= k_K[:, None]).to(tl.int32), 1)


@triton.jit
def popcount(word):
    """Count the bits set in each 16-bit word."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F
