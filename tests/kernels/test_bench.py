"""The benchmark says what it measured, and times nothing that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sparsecast.cli.bench import kernels_checks, kernels_problem, kernels_steps, kernels_timing
from sparsecast.cli.bench.kernels import BenchKernelsConfig, bench_kernels
from sparsecast.core.errors import InputError
from sparsecast.kernels.in_models import dispatch
from sparsecast.kernels.ops import down, gate_up

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

    monkeypatch.setattr("sparsecast.cli.bench.kernels_timing.microseconds", once)
    monkeypatch.setattr("sparsecast.cli.bench.kernels_timing.copies", lambda *_: 1)
    monkeypatch.setattr("sparsecast.cli.bench.kernels.copy_bandwidth", lambda _: 1e-3)
    monkeypatch.setattr("sparsecast.cli.bench.kernels._device", lambda: device)
    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    monkeypatch.setattr(down, "ONE_TOKEN_GROUPS", 4)
    monkeypatch.setitem(down.CONFIG, "GROUPS", 4)
    shapes = {"1b": (32, 32, 3), "opt-1.3b": (32, 32, 2)}
    monkeypatch.setattr("sparsecast.cli.bench.kernels_steps.SHAPES", shapes)
    monkeypatch.setattr("sparsecast.cli.bench.kernels.SHAPES", shapes)
    paths = {"exact": {0.75: 1, 0.8: 2}, "predicted": {0.532: 1}}
    monkeypatch.setattr(dispatch, "MEASURED", {device.type: {(32, 32, 3): paths}})
    monkeypatch.setattr(dispatch, "MAX_CPU_THREADS", torch.get_num_threads())


@pytest.mark.slow
def test_bench_kernels_says_what_it_measured(untimed, tmp_path):
    cfg = BenchKernelsConfig(
        shapes=["1b"], sparsities=[0.75], batches=[1], rank=32, json=tmp_path / "k.json"
    )
    values = bench_kernels(cfg)

    assert json.loads((tmp_path / "k.json").read_text()) == values
    rows = values["rows"]
    assert all(set(row) == KEYS for row in rows)
    one = {row["step"]: row for row in rows}
    assert list(one) == [
        "gate", "up", "down", "exact", "predictor f16", "cascade", "predicted f16",
        "predictor q8_0", "predicted q8_0", "predictor q4_0", "predicted q4_0",
    ]  # fmt: skip
    active, row = 8, 32 * 2
    assert one["up"]["gb_per_s"] == pytest.approx(active * row / 1e3)
    assert one["exact"]["gb_per_s"] == pytest.approx((32 + 2 * active) * row / 1e3)
    own = {
        name: 2 * 32 * 32 * bits / 8 for name, bits in (("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5))
    }
    predicted, fired = 15, 7  # 0.21 / 0.11 of 8, and 0.92 of 8
    cascade = (predicted + fired) * row
    for step, read in (
        ("gate", 32 * row),
        ("down", active * row),
        ("cascade", cascade),
        *((f"predictor {name}", nbytes) for name, nbytes in own.items()),
        *((f"predicted {name}", n + cascade + fired * row) for name, n in own.items()),
    ):
        assert one[step]["gb_per_s"] == pytest.approx(read / 1e3), step
    assert {step: r["auto"] for step, r in one.items() if r["auto"] is not None} == {
        "exact": True, "predicted f16": False, "predicted q8_0": False, "predicted q4_0": False,
    }  # fmt: skip
    assert one["up"]["of_copy_bandwidth"] == pytest.approx(one["up"]["gb_per_s"] / 1e-3)
    assert one["exact"]["speedup"] == 1
    assert one["cascade"]["dense_us"] is None
    assert one["cascade"]["speedup"] is None


@pytest.mark.slow
def test_an_ffn_without_a_gate_has_a_step_less_and_reads_less(untimed, monkeypatch):
    monkeypatch.setattr(kernels_steps, "FORMATS", ("f16",))
    cfg = BenchKernelsConfig(shapes=["opt-1.3b"], sparsities=[0.75], batches=[1, 2], rank=32)
    rows = bench_kernels(cfg)["rows"]

    assert [row["batch"] for row in rows] == [1] * 6 + [2] * 6
    one = {row["step"]: row["gb_per_s"] * 1e3 for row in rows if row["batch"] == 1}
    steps = ["gate", "down", "exact", "predictor f16", "cascade", "predicted f16"]
    assert list(one) == steps
    row, active = 32 * 2, 8
    assert one["gate"] == pytest.approx(32 * row)
    assert one["exact"] == pytest.approx((32 + active) * row)
    predicted = one["cascade"] / row  # no row is read for what fired
    assert predicted == pytest.approx(15, abs=2)
    fired = one["predicted f16"] / row - 2 * 32 - predicted
    assert fired == pytest.approx(7, abs=2)
    assert not any(row["auto"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1b", "opt-1.3b"])
def test_relu2_and_a_norm_are_measured_too(shape, untimed, monkeypatch):
    monkeypatch.setattr(kernels_steps, "FORMATS", ("f16",))
    ran = []
    real = kernels_steps.exact_ffn

    def told(x, ffn):
        ran.append((ffn.act, ffn.x1_norm_F is not None))
        return real(x, ffn)

    monkeypatch.setattr(kernels_steps, "exact_ffn", told)
    cfg = BenchKernelsConfig(
        shapes=[shape], sparsities=[0.75], batches=[1], rank=32, act="relu2", x1_norm=True
    )
    values = bench_kernels(cfg)

    assert (values["act"], values["x1_norm"]) == ("relu2", True)
    assert {"gate", "down", "exact", "predicted f16"} <= {row["step"] for row in values["rows"]}
    assert ran == [("relu2", True)] * 2


@pytest.mark.parametrize(("wrong", "step"), [({"squared": False}, "up"), ({"eps": 9.0}, "down")])
def test_a_wrong_square_or_norm_is_not_timed(wrong, step, untimed, monkeypatch):
    module, name = (gate_up, "gate_up") if step == "up" else (down, "down")
    real = getattr(module, name)
    if step == "up":
        monkeypatch.setattr(module, name, lambda *given, **after: real(*given, **after | wrong))
    else:
        monkeypatch.setattr(module, name, lambda *given: real(*given[:4], **wrong))
    cfg = BenchKernelsConfig(
        shapes=["1b"], sparsities=[0.5], batches=[1], rank=32, act="relu2", x1_norm=True
    )
    with pytest.raises(RuntimeError, match=f"{step} is off its reference"):
        bench_kernels(cfg)


@pytest.mark.parametrize(
    ("step", "sparsity", "tokens", "rank", "auto"),
    [
        ("exact", 0.8, 2, 32, True),  # a predictor's rank is nothing to it
        ("exact", 0.75, 1, 8, True),
        ("exact", 0.75, 2, 8, False),
        ("exact", 0.7, 1, 8, False),
        ("predicted q4_0", 0.755, 1, 8, True),  # 0.532 of them predicted silent
        ("predicted q4_0", 0.754, 1, 8, False),
        ("predicted q4_0", 0.755, 2, 8, False),
        ("predicted q4_0", 0.755, 1, 9, False),
        ("down", 0.8, 1, 8, None),
    ],
)
def test_a_row_says_what_auto_would_do(step, sparsity, tokens, rank, auto, untimed, device):
    case = kernels_checks.Case("1b", 32, 32, 3, rank, sparsity, tokens, torch.bfloat16, device)
    row = kernels_steps.as_row(case, kernels_steps.Timed(step, 1.0, 2.0, 1e6), 1e3)
    assert row["auto"] is auto


def test_a_wrong_kernel_is_not_timed(untimed, monkeypatch):
    real = down.down
    monkeypatch.setattr(down, "down", lambda *given: real(*given) * 1.03)
    # bfloat16 itself moves the 0.03 by up to 0.004
    with pytest.raises(RuntimeError, match=r"down is off its reference by 0.0[23]"):
        bench_kernels(BenchKernelsConfig(shapes=["1b"], sparsities=[0.5], batches=[1], rank=32))


@pytest.mark.parametrize("check", ["check_gate", "check_predictor", "check_rows", "check_down"])
def test_every_step_is_checked(check, untimed, monkeypatch):
    def refuse(case, *_):
        raise RuntimeError(f"{check} of {case.name}")

    monkeypatch.setattr(kernels_steps, check, refuse)
    with pytest.raises(RuntimeError, match=f"{check} of 1b"):
        bench_kernels(BenchKernelsConfig(shapes=["1b"], sparsities=[0.5], batches=[1], rank=32))


def test_a_predictor_that_decides_otherwise_is_not_timed(untimed, monkeypatch):
    real = kernels_checks.predictor.predict

    def all_but_one(*given):
        mask, chosen = real(*given)
        return mask, chosen ^ (torch.arange(len(chosen), device=chosen.device) == 3).int()

    monkeypatch.setattr(kernels_checks.predictor, "predict", all_but_one)
    with pytest.raises(RuntimeError, match="decides unlike its reference"):
        bench_kernels(BenchKernelsConfig(shapes=["1b"], sparsities=[0.5], batches=[1], rank=32))


def test_dense_is_the_faster_side_and_compiled_for_every_shape(untimed, monkeypatch, device):
    """Past eight shapes torch.compile would run eagerly; down has two layouts."""
    reset = []
    monkeypatch.setattr("torch.compiler.reset", lambda: reset.append(1))
    monkeypatch.setattr("torch.compile", lambda step, **_: (step, "compiled"))

    def microseconds(runs):
        func = runs[0].func
        if isinstance(func, tuple):
            return 1.0 if "linear" in func[0].__name__ else 2.0
        return 3.0

    monkeypatch.setattr("sparsecast.cli.bench.kernels_steps.partial", _Bound)
    monkeypatch.setattr(kernels_timing, "microseconds", microseconds)
    case = kernels_checks.Case("1b", 32, 32, 3, 32, 0.5, 1, torch.bfloat16, device)
    assert kernels_steps.dense(case) == (2.0, 2.0, 1.0, 1.0)
    assert reset == [1]


class _Bound:
    def __init__(self, func, *args):
        self.func, self.args = func, args


def test_weights_rotate_over_more_than_four_times_the_l2(monkeypatch):
    class Properties:
        L2_cache_size = 50_000_000

    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Properties)
    for read in (1e6, 7e6, 60e6):
        count = kernels_timing.copies(read, torch.device("cuda"))
        assert 4 * 50e6 < count * read < 4 * 50e6 + 2 * read + 10e6
    assert kernels_timing.copies(1e12, torch.device("cuda")) == 2


@pytest.mark.parametrize("tokens", [1, 3])
def test_problems_select_what_was_asked_for(tokens, device):
    goal = kernels_problem.targets(1000, tokens, 0.89, device)
    active, predicted = goal.active_TF.sum(1), goal.predicted_TF.sum(1)
    assert active.tolist() == [110] * tokens
    assert predicted.tolist() == [210] * tokens
    assert (goal.active_TF & goal.predicted_TF).sum(1).tolist() == [101] * tokens


def test_what_the_benchmark_refuses():
    cfg = BenchKernelsConfig()
    for change, told in (
        ({"shapes": ["8b"]}, "--shapes: got '8b', expected 30m, 1b, 7b, 13b, 70b, bitnet-2b, opt"),
        ({"shapes": []}, "--shapes: is empty; name one"),
        ({"dtype": "f32"}, "--dtype: got 'f32', expected bf16, f16"),
        ({"sparsities": [0.995]}, "--sparsities: got .*, expected numbers from 0 to 0.99;"),
        ({"sparsities": []}, "--sparsities"),
        ({"batches": [17]}, "--batches"),
        ({"rank": 8}, "--rank: must be at least 16, got 8"),
    ):
        with pytest.raises(InputError, match=told):
            replace(cfg, **change)


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device"):
        bench_kernels(BenchKernelsConfig())
