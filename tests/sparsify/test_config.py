"""Options are held to sense before anything is read, and tokens are what was asked for."""

from __future__ import annotations

from math import inf, nan

import pytest

from sparsecast.core.errors import InputError
from sparsecast.sparsify.config import SparsifyConfig


def options(folder, **changes) -> SparsifyConfig:
    return SparsifyConfig(**{"model": "m", "out": folder} | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": None}, "either --model or --preset"),
        ({"preset": "tiny"}, "either --model or --preset"),
        ({"model": None, "preset": "giant"}, "--preset: got 'giant'"),
        *(({"l1": x}, "--l1: must be at least 0") for x in (-5.0, -1e-9)),
        *(({"lr": x}, r"--lr: must be in \(0, inf\)") for x in (-1.0, 0.0)),
        *(({"shift_tolerance": x}, "--shift-tolerance: must be at least 0") for x in (-1.0, -0.1)),
        *(
            ({name: x}, f"{option}.*: got {x}, expected a number")
            for name, option in (("l1", "--l1"), ("lr", "--lr"), ("shift_tolerance", "--shift"))
            for x in (nan, inf)
        ),
        *(({"pretrain_share": x}, "--pretrain-share: ") for x in (-0.1, 1.0, nan)),
        *(({"eval_tokens": x}, "--eval-tokens: must be at least 2") for x in (-1, 0, 1)),
        *(({"seq_len": x}, "--seq-len: must be at least 2") for x in (-1, 0, 1)),
        *(({"seed": x}, "--seed: must be at") for x in (-1, 2**32, 2**70)),
        ({"batch_tokens": 8}, "--batch-tokens: got 8, expected at least one sequence"),
        ({"tokens": 1}, "--tokens: got 1, expected at least 32,768: one step"),
        ({"tokens": 0}, "--tokens: must be at least 1, got 0"),
        ({"tokens": 2.5}, "--tokens: got 2.5, expected a whole number"),
        ({"out": ""}, "--out: got '', expected a path"),
        ({"model": None, "preset": "tiny", "tokens": 40_000}, "at least 65,536: two steps"),
        ({"stages": "1b"}, "--stages: is for ProSparse's recipe; give --l1 instead of a target"),
        ({"shift_tolerance": 0.1}, "--shift-tolerance: is for ProSparse's recipe; .* --baselines"),
        ({"pretrain_share": 0.2}, "--pretrain-share: is for --preset, which is not given"),
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
