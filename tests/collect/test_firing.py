"""Where nothing fires there is nothing to predict, and nothing to say good things of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.collect.store.filler import Filler
from sparsecast.collect.store.firing import check_firing
from sparsecast.collect.store.stats import Stats
from sparsecast.core.errors import InputError


def counts(*fired: int, tokens: int = 10, width: int = 4) -> Stats:
    """Statistics of layers whose first `fired` neurons fired on every token."""
    tables = {}
    for layer, number in enumerate(fired):
        each = torch.zeros(width, dtype=torch.int64)
        each[:number] = tokens
        spread = torch.zeros(width + 1, dtype=torch.int64)
        spread[number] = tokens
        tables |= {f"train.layer.{layer}.fired": each, f"train.layer.{layer}.active": spread}
    return Stats(tables)


def test_silence_is_refused_and_odd_layers_are_named(capfd):
    with pytest.raises(InputError, match=r"x: nothing fires in any layer on 10 tokens.*smaller"):
        check_firing(counts(0, 0), [0, 1], "x")
    assert capfd.readouterr().err == ""
    check_firing(counts(0, 2, 4, 1), [0, 1, 2, 3], "x")
    told = capfd.readouterr().err
    assert "x, 10 tokens: nothing fires in layer 0; recall is 1 there by definition" in told
    assert "every neuron fires on every token in layer 2, so there is no sparsity" in told
    check_firing(counts(1, *[0] * 12), list(range(13)), "x")
    assert "in layers 1, 2, 3, 4, 5, 6, 7, 8 and 4 more;" in capfd.readouterr().err
    check_firing(counts(1, 2, 3), [0, 1, 2], "x")
    assert capfd.readouterr().err == ""


@pytest.fixture
def cfg(model_folder, corpus, tmp_path) -> CollectConfig:
    return CollectConfig(
        model=str(model_folder),
        corpus=str(corpus),
        out=tmp_path / "acts",
        tokens=600,
        seq_len=64,
        activation_threshold=1e4,
    )


def test_a_collection_in_which_nothing_fires_leaves_nothing(cfg, tmp_path):
    with pytest.raises(InputError, match=r"nothing fires in any layer on 600 tokens"):
        collect(cfg)
    assert list(tmp_path.iterdir()) == []
    collect(replace(cfg, activation_threshold=None))


def test_a_long_collection_in_which_nothing_fires_ends_early(cfg, tmp_path, monkeypatch):
    begun = []
    begin = Filler.begin

    def counted(self, unit, buffer):
        begun.append(unit.tokens)
        begin(self, unit, buffer)

    monkeypatch.setattr(Filler, "begin", counted)
    monkeypatch.setattr("sparsecast.collect.store.shard.SHARD_BYTES", 400_000)
    with pytest.raises(InputError, match=r"the model: nothing fires in any layer on [12],\d{3} to"):
        collect(replace(cfg, tokens=16_000))
    assert sum(begun) < 6_000
    assert list(tmp_path.iterdir()) == []
