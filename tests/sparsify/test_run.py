"""The stage on a model of a few thousand parameters: it runs, resumes, and saves what it scored."""

from __future__ import annotations

import json

import pytest

from sparsecast.core.models.loading import load_model
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.measure import score
from sparsecast.sparsify.run import sparsify
from tests.tools.measured_text import held_out_batches


def options(corpus, out, **changes) -> SparsifyConfig:
    base = {"preset": "micro", "corpus": str(corpus), "out": out, "eval_tokens": 2_000}
    return SparsifyConfig(
        **base | {"seq_len": 64, "batch_tokens": 1_024, "device": "cpu"} | changes
    )


def test_l1_makes_a_sparser_model_and_the_card_tells_the_truth(corpus, tmp_path):
    cfg = options(corpus, tmp_path / "out", baselines=True, l1=5.0)

    sparsify(cfg)

    held_out = json.loads((cfg.out / "sparsify.json").read_text())["held_out"]
    assert list(held_out) == [
        "SiLU original",
        "plain ReLU",
        "fixed L1",
        "ProSparse before the shift",
        "ProSparse after the shift",
    ]
    silu, relu, fixed, before, after = (row["sparsity"] for row in held_out.values())
    assert silu < relu < min(fixed, before) - 0.05
    assert before < after
    model, tokenizer = load_model(str(cfg.out), device="cpu")
    data = held_out_batches(cfg, tokenizer)
    again, told = score(model, data), held_out["ProSparse after the shift"]
    assert again.perplexity == pytest.approx(told["perplexity"])
    assert again.sparsity == pytest.approx(told["sparsity"])
    assert again.layer_sparsity == pytest.approx(told["layer_sparsity"])
    assert list(again.dead_neurons) == told["dead_neurons"]
    card = (cfg.out / "README.md").read_text()
    assert f"{told['perplexity']:.3f}" in card
    assert card.count("how the original goes on") == card.count("how the model goes on") > 0
