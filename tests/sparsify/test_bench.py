"""`bench sparsify` trains what `sparsify` trains, and says what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from sparsecast.cli.bench import sparsify, sparsify_sides
from sparsecast.cli.bench.sparsify import BenchSparsifyConfig, bench_sparsify
from sparsecast.core.errors import InputError


@pytest.fixture
def cfg(tmp_path):
    return BenchSparsifyConfig(
        preset="micro", batch_size=3, seq_len=16, steps=2, warmup=1, rounds=2, device="cpu",
        json=tmp_path / "b.json",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _any_preset(monkeypatch):
    monkeypatch.setattr(sparsify, "validate_fields", lambda *_, **__: None)


def test_rates_are_tokens_over_the_timed_seconds(cfg, monkeypatch):
    monkeypatch.setattr(
        sparsify_sides.Side,
        "seconds_per_step",
        lambda side: {"Bare": 0.5, "SparsifyModule": 1.0}[type(side._module).__name__],
    )
    values = bench_sparsify(cfg)

    assert json.loads(cfg.json.read_text()) == values
    assert values["tokens_per_s"] == {"bare": 96, "l1": 48, "target": 48}
    assert values["over_bare"] == {"bare": 1, "l1": 0.5, "target": 0.5}
    assert values["batch_tokens"] == 48
    assert [len(runs) for runs in values["runs"].values()] == [2, 2, 2]


def test_every_round_trains_all_its_steps(cfg, monkeypatch):
    """Same start, same batches: only the activation and the loss differ."""
    losses: dict[str, list[float]] = {}
    for module in (sparsify_sides.Bare, sparsify_sides.SparsifyModule):
        own = module.training_step

        def told(self, batch, index, own=own):
            loss = own(self, batch, index)
            kind = type(self).__name__ + ("" if getattr(self, "raised", None) is None else "+T")
            losses.setdefault(kind, []).append(float(loss))
            return loss

        monkeypatch.setattr(module, "training_step", told)
    values = bench_sparsify(cfg)

    assert {name: len(found) for name, found in losses.items()} == {
        "Bare": 6, "SparsifyModule": 6, "SparsifyModule+T": 6,
    }  # fmt: skip
    for found in losses.values():
        assert found[0] == pytest.approx(5.99, abs=0.4)  # ln 400, of 400 random tokens
        assert found[3] < found[0]  # the same batch at the start of the second round
    assert all(rate > 0 for rate in values["tokens_per_s"].values())
    assert values["peak_bytes"] == {"bare": None, "l1": None, "target": None}


def test_a_model_gives_its_shape_alone(cfg, dense):
    folder = dense("opt", "gelu")
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])  # no weight is read
    values = bench_sparsify(
        BenchSparsifyConfig(
            model=str(folder), batch_size=2, seq_len=8, steps=1, warmup=1, rounds=1, device="cpu"
        )
    )
    assert values["parameters"] > 0
    assert torch.isfinite(torch.tensor(list(values["tokens_per_s"].values()))).all()


def test_a_sparse_model_is_refused():
    with pytest.raises(InputError, match="has fatrelu, expected a dense model"):
        bench_sparsify(BenchSparsifyConfig(model="tiny-prosparse", device="cpu"))
