"""Logits at the threshold, in the order of the engine's vector code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsecast.export.engine.ties import resolve_ties


def by_hand(scale_x, code_x, scale_w, code_w) -> float:
    """Eight accumulators, four elements of a block each; halves are added at the end."""
    lanes = [np.float32(0)] * 8
    for block in range(len(scale_x)):
        scale = np.float64(np.float32(scale_x[block]) * np.float32(scale_w[block]))
        for k in range(8):
            four = slice(4 * k, 4 * k + 4)
            whole = int(np.dot(code_x[block][four].astype(int), code_w[block][four].astype(int)))
            lanes[k] = np.float32(scale * whole + np.float64(lanes[k]))
    low = [lanes[k] + lanes[k + 4] for k in range(4)]
    return float((low[0] + low[2]) + (low[1] + low[3]))


def q8_0(hidden_R):
    """Scales and codes of a token's hidden units, block by block."""
    blocks = hidden_R.reshape(-1, 32)
    largest = abs(blocks).max(1, keepdims=True)
    codes = np.rint(blocks * (np.float32(127) / largest))
    return (largest[:, 0] / np.float32(127)).astype(np.float16).astype(np.float32), codes


def case(blocks: int):
    """A token's hidden units, and rows of fc2; scales have all their bits, so that sums round."""
    generator = np.random.default_rng(blocks)
    hidden_R = generator.random(blocks * 32).astype(np.float32) + np.float32(0.1)
    code_FBK = generator.integers(-7, 8, (400, blocks, 32), np.int8)
    scale_FB = (generator.random((400, blocks)) + 0.3).astype(np.float16).astype(np.float32)
    return hidden_R, scale_FB, code_FBK


@pytest.mark.parametrize("blocks", [1, 3])
def test_near_logits_are_summed_as_the_engine_does(blocks):
    """With the threshold at a logit's exact value it is near."""
    hidden_R, scale_FB, code_FBK = case(blocks)
    scale_B, code_BK = q8_0(hidden_R)
    moved = 0
    for scales, codes in zip(scale_FB[::7], code_FBK[::7], strict=True):
        terms_BK = scale_B[:, None].astype(np.float64) * scales[:, None] * code_BK * codes
        exact = torch.tensor([[terms_BK.sum()]], dtype=torch.float32)
        weights = torch.from_numpy(scales)[None], torch.from_numpy(codes)[None]

        got = resolve_ties(exact, torch.from_numpy(hidden_R)[None], *weights, exact.item())

        assert got.item() == by_hand(scale_B, code_BK, scales, codes)
        moved += got.item() != exact.item()
    assert moved > 20


def test_terms_that_cancel_need_not_leave_zero():
    """127 - 100 - 27 times a scale of 22 bits, in three of the eight sums."""
    code_K = np.zeros(32, np.float32)
    code_K[[0, 4, 8]] = 127, 100, 27
    weight_K = np.zeros(32, np.int8)
    weight_K[[0, 4, 8]] = 1, -1, -1
    scale, weight_scale = np.float32(np.float16(0.1234)), np.float32(np.float16(0.777))
    weights = torch.full((1, 1), float(weight_scale)), torch.from_numpy(weight_K)[None, None]

    got = resolve_ties(torch.zeros(1, 1), torch.from_numpy(scale * code_K)[None], *weights, 0.0)

    assert got.item() != 0
    assert got.item() == by_hand([scale], [code_K], [weight_scale], [weight_K])


def test_logits_away_from_the_threshold_and_true_zeros_stay():
    hidden_R, scale_FB, code_FBK = case(2)
    logits_TF = torch.randn(2, 400) + 1e9
    x_TR = torch.from_numpy(np.stack([hidden_R, 0 * hidden_R]))
    logits_TF[1] = 0

    got = resolve_ties(logits_TF, x_TR, torch.from_numpy(scale_FB), torch.from_numpy(code_FBK), 0.0)

    assert torch.equal(got, logits_TF)
