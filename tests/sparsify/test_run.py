"""The stage on a model of a few thousand parameters: it runs, resumes, and saves what it scored."""

from __future__ import annotations

import json

import pytest
import torch

from sparsecast.collect.corpus import documents
from sparsecast.collect.errors import InputError
from sparsecast.collect.models import load_model
from sparsecast.collect.splits import assign
from sparsecast.collect.tokens import batches
from sparsecast.sparsify import config, phases
from sparsecast.sparsify.config import Preset, SparsifyConfig
from sparsecast.sparsify.measure import score
from sparsecast.sparsify.run import sparsify

MICRO = Preset(
    hidden_size=32,
    ffn_width=96,
    layers=2,
    heads=2,
    kv_heads=1,
    vocab_size=400,
    tokens=40_960,
    lr=5e-3,
    l1=5.0,
)


@pytest.fixture(autouse=True)
def _micro(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "micro", MICRO)


def options(corpus, out, **changes) -> SparsifyConfig:
    base = {"preset": "micro", "corpus": str(corpus), "out": out, "eval_tokens": 2_000}
    return SparsifyConfig(
        **base | {"seq_len": 64, "batch_tokens": 1_024, "device": "cpu"} | changes
    )


def test_l1_makes_a_sparser_model_and_the_card_tells_the_truth(corpus, tmp_path):
    cfg = options(corpus, tmp_path / "out", baselines=True)

    sparsify(cfg)

    held_out = json.loads((cfg.out / "sparsify.json").read_text())["held_out"]
    assert list(held_out) == [
        "SiLU original",
        "plain ReLU",
        "ProSparse before the shift",
        "ProSparse after the shift",
    ]
    sparsity = [row["sparsity"] for row in held_out.values()]
    assert sparsity == sorted(sparsity)
    assert sparsity[2] > sparsity[1] + 0.05
    model, tokenizer = load_model(str(cfg.out), device="cpu")
    docs = assign(documents(cfg.corpus))
    quota = {"held-out": cfg.eval_tokens}
    data = list(batches(docs, tokenizer, quota, seq_len=cfg.seq_len, batch_size=32))
    again, told = score(model, data), held_out["ProSparse after the shift"]
    assert again.perplexity == pytest.approx(told["perplexity"])
    assert again.sparsity == pytest.approx(told["sparsity"])
    assert f"{told['perplexity']:.3f}" in (cfg.out / "README.md").read_text()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "CHECKPOINT_STEPS", 7)
    whole, parts = options(corpus, tmp_path / "whole"), options(corpus, tmp_path / "parts")
    sparsify(whole)
    step = phases.SparsifyModule.training_step

    for stop_at in (10, 30):  # in pre-training (16 steps), then in the sparse phase
        calls = iter(range(10_000))

        def interrupted(self, batch, index, calls=calls, stop_at=stop_at):
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            return step(self, batch, index)

        monkeypatch.setattr(phases.SparsifyModule, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sparsify(parts)
        assert not parts.out.exists()
    monkeypatch.setattr(phases.SparsifyModule, "training_step", step)
    sparsify(parts)

    a, b = (load_model(str(cfg.out), device="cpu")[0].state_dict() for cfg in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / ".parts.work").exists()


def test_an_interrupted_run_refuses_other_options(corpus, tmp_path):
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "options.json").write_text('{"seed": 1}')

    with pytest.raises(InputError, match=r"seed was 1, now 0"):
        sparsify(options(corpus, tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"preset": None}, "either --model or --preset"),
        ({"model": "x"}, "either --model or --preset"),
        ({"preset": "giant"}, "--preset: got 'giant'"),
        ({"batch_tokens": 8}, "--batch-tokens 8"),
        ({"pretrain_share": 1.0}, "--pretrain-share"),
    ],
)
def test_bad_options_are_named(corpus, tmp_path, changes, match):
    with pytest.raises(InputError, match=match):
        options(corpus, tmp_path / "out", **changes)
