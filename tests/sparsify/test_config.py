"""Options are held to sense before anything is read, and tokens are what was asked for."""

from __future__ import annotations

from math import inf, nan

import pytest

from sparsecast.collect.errors import InputError
from sparsecast.sparsify.config import SparsifyConfig


def options(out, **changes) -> SparsifyConfig:
    return SparsifyConfig(**{"model": "m", "out": out} | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": None}, "either --model or --preset"),
        ({"preset": "tiny"}, "either --model or --preset"),
        ({"model": None, "preset": "giant"}, "--preset: got 'giant'"),
        *(({"l1": x}, f"--l1: got {x}, expected a number >= 0") for x in (-5.0, nan, inf)),
        *(({"lr": x}, f"--lr: got {x}, expected a number > 0") for x in (-1.0, 0.0, nan, inf)),
        *(({"shift_tolerance": x}, f"--shift-tolerance: got {x}") for x in (-1.0, nan, inf)),
        *(({"pretrain_share": x}, f"--pretrain-share: got {x}") for x in (-0.1, 1.0, nan)),
        *(({"eval_tokens": x}, f"--eval-tokens: got {x}, expected at") for x in (-1, 0, 1)),
        *(({"seq_len": x}, f"--seq-len: got {x}, expected at") for x in (-1, 0, 1)),
        *(({"seed": x}, f"--seed: got {x}, expected") for x in (-1, 2**32, 2**70)),
        ({"batch_tokens": 8}, "--batch-tokens: got 8, expected at least one sequence"),
        ({"tokens": 1}, "--tokens: got 1, expected at least 32,768: one step"),
        ({"tokens": 0}, "--tokens: got 0"),
        ({"tokens": -5}, "--tokens: got -5"),
        ({"model": None, "preset": "tiny", "tokens": 40_000}, "at least 65,536: two steps"),
    ],
)
def test_bad_options_are_named(tmp_path, changes, match):
    with pytest.raises(InputError, match=match):
        options(tmp_path, **changes)


@pytest.mark.parametrize(
    ("tokens", "batch_tokens", "seq_len", "steps", "trained"),
    [
        (16_384, 2_048, 512, 8, 16_384),
        (160_000_000, 32_768, 512, 4_882, 159_973_376),  # as the shipped model's card says
        (10_000, 1_000, 512, 19, 9_728),  # a step holds one whole sequence
        (2_048, 2_048, 2_048, 1, 2_048),
    ],
)
def test_tokens_are_trained_in_whole_steps_and_never_more(
    tmp_path, tokens, batch_tokens, seq_len, steps, trained
):
    cfg = options(tmp_path, tokens=tokens, batch_tokens=batch_tokens, seq_len=seq_len)

    assert (cfg.steps, cfg.steps * cfg.step_tokens) == (steps, trained)
    assert trained <= tokens


@pytest.mark.parametrize("share", [1e-9, 0.4, 1 - 1e-16])
def test_pre_training_and_sparse_training_both_happen(tmp_path, share):
    cfg = SparsifyConfig(out=tmp_path, preset="tiny", tokens=2 * 32_768, pretrain_share=share)

    assert (cfg.steps, cfg.pretrain_steps) == (2, 1)
