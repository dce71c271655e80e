"""The benchmark says what it measured, and times nothing that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sparsecast.cli.bench_kernels import BenchKernelsConfig, bench
from sparsecast.collect.errors import InputError
from sparsecast.kernels import down, problem

KEYS = {
    "shape", "step", "sparsity", "batch", "us", "dense_us", "speedup", "gb_per_s",
    "of_copy_bandwidth", "auto",
}  # fmt: skip


@pytest.fixture
def untimed(monkeypatch, device):
    """Small shapes, each run once, every time a microsecond."""

    def once(runs):
        for run in runs:
            run()
        return 1.0

    monkeypatch.setattr("sparsecast.kernels.timing.microseconds", once)
    monkeypatch.setattr("sparsecast.kernels.timing.copies", lambda *_: 1)
    monkeypatch.setattr("sparsecast.cli.bench_kernels.copy_bandwidth", lambda _: 1e-3)
    monkeypatch.setattr("sparsecast.cli.bench_kernels._device", lambda: device)
    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    shapes = {"1b": (32, 32)}
    monkeypatch.setattr("sparsecast.kernels.bench.SHAPES", shapes)
    monkeypatch.setattr("sparsecast.cli.bench_kernels.SHAPES", shapes)


def test_bench_kernels_says_what_it_measured(untimed, tmp_path):
    cfg = BenchKernelsConfig(
        shapes=["1b"], sparsities=[0.75], batches=[1, 2], rank=32, json=tmp_path / "k.json"
    )
    values = bench(cfg)

    assert json.loads((tmp_path / "k.json").read_text()) == values
    rows = values["rows"]
    assert all(set(row) == KEYS for row in rows)
    assert {row["batch"] for row in rows} == {1, 2}
    one = {row["step"]: row for row in rows if row["batch"] == 1}
    assert list(one) == [
        "gate", "up", "down", "exact", "predictor f16", "cascade", "predicted f16",
        "predictor q8_0", "predicted q8_0", "predictor q4_0", "predicted q4_0",
    ]  # fmt: skip
    active, row = 8, 32 * 2
    assert one["up"]["gb_per_s"] == pytest.approx(active * row / 1e3)
    assert one["exact"]["gb_per_s"] == pytest.approx((32 + 2 * active) * row / 1e3)
    assert one["predictor q4_0"]["gb_per_s"] == pytest.approx((2 * 32 * 32) * 4.5 / 8 / 1e3)
    assert one["up"]["of_copy_bandwidth"] == pytest.approx(one["up"]["gb_per_s"] / 1e-3)
    assert one["exact"]["speedup"] == 1
    assert one["cascade"]["dense_us"] is None
    assert one["cascade"]["speedup"] is None


def test_a_wrong_kernel_is_not_timed(untimed, monkeypatch):
    real = down.down
    monkeypatch.setattr(down, "down", lambda *given: real(*given) * 1.03)
    with pytest.raises(RuntimeError, match="down is off its reference by 0.03"):
        bench(BenchKernelsConfig(shapes=["1b"], sparsities=[0.5], batches=[1], rank=32))


@pytest.mark.parametrize("tokens", [1, 3])
def test_problems_select_what_was_asked_for(tokens, device):
    goal = problem.targets(1000, tokens, 0.89, device)
    active, predicted = goal.active_TF.sum(1), goal.predicted_TF.sum(1)
    assert active.tolist() == [110] * tokens
    assert predicted.tolist() == [210] * tokens
    assert (goal.active_TF & goal.predicted_TF).sum(1).tolist() == [101] * tokens


def test_what_the_benchmark_refuses():
    cfg = BenchKernelsConfig()
    for change, told in (
        ({"shapes": ["8b"]}, "--shapes: got '8b', expected 1b, 7b, 13b, 70b"),
        ({"shapes": []}, "--shapes: got nothing"),
        ({"dtype": "f32"}, "--dtype: got 'f32', expected bf16, f16"),
        ({"sparsities": [1.0]}, "--sparsities"),
        ({"batches": [17]}, "--batches"),
        ({"rank": 8}, "--rank: must be at least 16, got 8"),
    ):
        with pytest.raises(InputError, match=told):
            replace(cfg, **change)


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device"):
        bench(BenchKernelsConfig())
