"""Logits at the threshold, in the order of the engine's vector code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsecast.export.ties import settled


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


def case(blocks: int):
    """A token's hidden units, and rows of fc2 whose terms cancel in exact arithmetic."""
    generator = np.random.default_rng(blocks)
    hidden_R = generator.integers(1, 128, blocks * 32).astype(np.float32)
    hidden_R[::32] = 127  # so that codes are the numbers themselves
    code_FBK = generator.integers(-7, 8, (400, blocks, 32), np.int8)
    code_FBK[:, :, 31] = 0
    scale_FB = np.float16(0.37) * np.ones((400, blocks), np.float32)
    return hidden_R, scale_FB, code_FBK


@pytest.mark.parametrize("blocks", [1, 3])
def test_near_logits_are_summed_as_the_engine_does(blocks):
    hidden_R, scale_FB, code_FBK = case(blocks)
    x_TR = torch.from_numpy(hidden_R)[None]
    want_F = [
        by_hand([1.0] * blocks, hidden_R.reshape(blocks, 32), s, c)
        for s, c in zip(scale_FB, code_FBK, strict=True)
    ]
    exact_F = (hidden_R.reshape(blocks, 32) * code_FBK).sum((1, 2)) * np.float64(scale_FB[0, 0])

    for f in range(0, 400, 7):  # with the threshold at the logit every one of them is near
        logits_TF = torch.full((1, 1), float(exact_F[f]))
        got = settled(
            logits_TF,
            x_TR,
            torch.from_numpy(scale_FB[f : f + 1]),
            torch.from_numpy(code_FBK[f : f + 1]),
            float(exact_F[f]),
        )
        assert got.item() == want_F[f]


def test_terms_that_cancel_need_not_leave_zero():
    """A third of 10 + 20 + ... - 60 in float32 is no zero in the engine, and is none here."""
    code_x = np.array([1, 0, 0, 0] * 8, np.float32)
    code_x[0] = 127
    code_w = np.zeros(32, np.int8)
    code_w[0], code_w[4], code_w[8], code_w[12] = 1, -64, -62, -1
    scale = np.float32(np.float16(1 / 3))
    x_TR = torch.from_numpy(code_x)[None]
    weights = torch.full((1, 1), float(scale)), torch.from_numpy(code_w)[None, None]

    got = settled(torch.zeros(1, 1), x_TR, *weights, 0.0)

    assert got.item() == by_hand([1.0], [code_x], [scale], [code_w])


def test_logits_away_from_the_threshold_and_true_zeros_stay():
    hidden_R, scale_FB, code_FBK = case(2)
    logits_TF = torch.randn(2, 400) + 1e9
    x_TR = torch.from_numpy(np.stack([hidden_R, 0 * hidden_R]))
    logits_TF[1] = 0

    got = settled(logits_TF, x_TR, torch.from_numpy(scale_FB), torch.from_numpy(code_FBK), 0.0)

    assert torch.equal(got, logits_TF)
