"""The benchmarks run, on what they say; what they measure is for their readers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from sparsecast.cli.bench.train import BenchTrainConfig, bench_train
from sparsecast.cli.bench.train_runs import Rows
from sparsecast.cli.bench.train_store import ACTIVE, random_store
from sparsecast.core.errors import InputError
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.training.data import TokenBlocks


def test_the_random_store_is_a_store(tmp_path):
    store = random_store(tmp_path, 64, 200, 3, 320)
    assert store.manifest.tokens("train") == 320
    for layer in range(3):
        rows = [active_TF for _, active_TF in layer_batches(store, "train", layer)]
        assert torch.cat(rows).float().mean().item() == pytest.approx(ACTIVE, abs=0.01)
    batches = list(TokenBlocks(store, "train", 64, seed=0))
    assert [batch.x_LBD.shape for batch in batches] == [(3, 64, 64)] * 5


def test_the_recipes_rows_are_float_tensors_and_never_silent():
    import numpy as np

    x, label = np.ones((2, 3), np.float16), np.array([[0, 2.5], [0, 0]], np.float16)
    rows = Rows(x, label)
    assert len(rows) == 2
    assert [part.dtype for part in rows[0]] == [torch.float32] * 2
    assert rows[0][1].tolist() == [0, 2.5]
    with pytest.raises(ValueError, match="row 1 has no active neuron"):
        rows[1]


def test_bench_train_says_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsecast.cli.bench.train.SHAPES", {"tiny": (64, 200, 2)})
    monkeypatch.setattr("sparsecast.cli.bench.train_runs.MATMUL", {"cpu": 64})
    cfg = BenchTrainConfig(batch_size=32, steps=2, rounds=1, device="cpu", json=tmp_path / "b.json")
    values = bench_train(cfg)
    assert json.loads((tmp_path / "b.json").read_text()) == values
    rates = values["token_layers_per_s"]
    assert set(rates) == {"store", "resident", "read", "reference"}
    assert values["store_of_limit"] == pytest.approx(
        rates["store"] / min(rates["resident"], rates["read"])
    )
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    assert values["speedup"] == pytest.approx(rates["store"] / rates["reference"])
    assert values["extrapolated_minutes"]["store"] == pytest.approx(
        400_000 * 20 * 2 / rates["store"] / 60
    )
    for change in ({"shape": "8b"}, {"batch_size": 100}, {"steps": 0}, {"rank": 2}):
        with pytest.raises(InputError, match="--"):
            replace(cfg, **change)
