"""Sets as words of 16 bits: written by flags, read by place."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sparsecast.kernels.ops.bitmask import kth_bit, pack, popcount, reference, words_before


@triton.jit
def _write(on, mask, N: tl.constexpr):
    tl.store(mask + tl.arange(0, N // 16), pack(tl.load(on + tl.arange(0, N)) != 0))


@triton.jit
def _read(mask, places, before, WORDS: tl.constexpr):
    w = tl.program_id(0)
    k = tl.arange(0, 16)
    word = tl.load(mask + w).to(tl.int32) & 0xFFFF
    tl.store(places + w * 16 + k, kth_bit(word, k))
    tl.store(before + w, tl.sum(popcount(words_before(mask, w, WORDS)), 0))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_set_is_read_as_it_was_written(share, banded, device):
    on = banded((torch.rand(64) < share).to(torch.int32))
    mask = torch.empty(4, dtype=torch.int16, device=device)
    _write[(1,)](on, mask, N=64)
    assert torch.equal(reference(mask, 64), on.bool())

    places = torch.empty(64, dtype=torch.int32, device=device)
    before = torch.empty(4, dtype=torch.int32, device=device)
    _read[(4,)](mask, places, before, WORDS=4)
    for w, flags in enumerate(on.view(4, 16).cpu()):
        found = flags.nonzero().flatten().tolist()
        assert places.view(4, 16)[w].tolist() == found + [16] * (16 - len(found))
        assert before[w] == on[: 16 * w].sum()


def test_the_width_cuts_the_last_word():
    assert reference(torch.tensor([-1, 3], dtype=torch.int16), 18).sum() == 18
    assert reference(torch.tensor([-1, 7], dtype=torch.int16), 18).sum() == 18
