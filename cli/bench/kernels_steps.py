"""Check every kernel and the whole FFN, then time them against dense torch.

    gate, up, down      the three steps of the exact path; without a gate, "gate" is the first
                        projection and there is no "up"
    exact               the whole exact path
    predictor TYPE      both products, threshold and selection, with weights in f16, q8_0 or q4_0
    cascade             the gate for predicted neurons, up for those that fired
    predicted TYPE      predictor, cascade and down

The square of ReLU² is part of "up" (without a gate, of no step by itself) and a norm of x1 is part
of "down", on both sides.

Dense time is that of the faster of cuBLAS and torch.compile on the same step; the predictor and the
cascade have none, "predicted" has. The tokens of a batch select neurons independently, which gives
the largest possible union. Bytes are those of the weight rows that had to be read. Both sides are
CUDA graphs over rotating copies of the weights, see kernels_timing.py. Rows of a whole FFN also say
whether the policy auto would take this path; if not, it runs the model's own FFN.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sparsecast.cli.bench import kernels_problem, kernels_timing
from sparsecast.cli.bench.kernels_checks import (
    Case,
    check_down,
    check_gate,
    check_predictor,
    check_rows,
    projections,
)
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.kernels.in_models.dispatch import max_tokens
from sparsecast.kernels.ops import active_list, down, gate, gate_up, predictor
from sparsecast.kernels.ops.ffn import FFN, PredictorWeights, exact_ffn, predicted_ffn

SHAPES = {
    "30m": (512, 2048, 3),
    "1b": (1536, 3840, 3),
    "7b": (4096, 11008, 3),
    "13b": (5120, 13824, 3),
    "70b": (8192, 28672, 3),
    "bitnet-2b": (2560, 6912, 3),
    "opt-1.3b": (2048, 8192, 2),
    "opt-6.7b": (4096, 16384, 2),
    "minitron-4b": (3072, 9216, 2),
    "afm-4.5b": (2560, 18432, 2),
}
"""(D, F, matrices): the preset of sparsify, MiniCPM-S-1B, Llama 2 7B, 13B and 70B, BitNet b1.58 2B,
OPT, Minitron 4B and AFM-4.5B."""
FORMATS = ("f16", "q8_0", "q4_0")


class Dense(NamedTuple):
    """Microseconds of the dense steps; `up` is None without a gate."""

    gate: float
    up: float | None
    down: float
    whole: float


class Timed(NamedTuple):
    """One step's time, the dense time to compare with, and the bytes it had to read."""

    step: str
    us: float
    dense_us: float | None
    read_bytes: float


def dense(case: Case) -> Dense:
    """Time each dense step with cuBLAS and torch.compile, down in both layouts; keep the fastest.

    The times do not depend on the case's sparsity.
    """
    torch.compiler.reset()  # after some number of shapes, torch.compile silently runs eagerly
    row_bytes = case.d * case.dtype.itemsize
    # A step reads one matrix of a set, so the bytes of one matrix decide the number of sets.
    count = kernels_timing.copies(case.f * row_bytes, case.device)
    weights = [[_matrix(case) for _ in range(case.matrices)] for _ in range(count)]
    x_TD = kernels_problem.inputs(case.tokens, case.d, case.dtype, case.device)
    act_TF = torch.randn(case.tokens, case.f, dtype=case.dtype, device=case.device).relu()
    norm = kernels_problem.norm(case.f, case.dtype, case.device) if case.x1_norm else None

    def of_gate(x: Tensor, gate: Tensor) -> Tensor:
        return torch.relu(x @ gate.T)

    def squared(act: Tensor) -> Tensor:
        return act.square() if case.act == "relu2" else act

    def of_up(x: Tensor, act: Tensor, up: Tensor) -> Tensor:
        return squared(act) * (x @ up.T)

    def normed(x1: Tensor) -> Tensor:
        return x1 if norm is None else functional.rms_norm(x1, (case.f,), *norm)

    def of_down(x1: Tensor, down: Tensor) -> Tensor:
        return normed(x1) @ down

    def as_linear(x1: Tensor, down: Tensor) -> Tensor:
        return normed(x1) @ down.view(case.d, case.f).T  # a matrix as nn.Linear keeps it

    def x1(x: Tensor, gate: Tensor, *up: Tensor) -> Tensor:
        act = of_gate(x, gate)
        return of_up(x, act, *up) if up else squared(act)

    def whole(x: Tensor, *weights: Tensor) -> Tensor:
        return of_down(x1(x, *weights[:-1]), weights[-1])

    def whole_as_linear(x: Tensor, *weights: Tensor) -> Tensor:
        return as_linear(x1(x, *weights[:-1]), weights[-1])

    ups = [(x_TD, act_TF, some[1]) for some in weights if case.matrices == 3]
    return Dense(
        _fastest((of_gate,), [(x_TD, some[0]) for some in weights]),
        _fastest((of_up,), ups) if ups else None,
        _fastest((of_down, as_linear), [(act_TF, some[-1]) for some in weights]),
        _fastest((whole, whole_as_linear), [(x_TD, *some) for some in weights]),
    )


def steps(case: Case, against: Dense) -> Iterator[Timed]:
    """Check and time every step of one case.

    Raises:
        RuntimeError: A kernel disagrees with its reference.
    """
    row_bytes = case.d * case.dtype.itemsize
    goal = kernels_problem.targets(case.f, case.tokens, case.sparsity, case.device)
    x_TD = kernels_problem.inputs(case.tokens, case.d, case.dtype, case.device)

    weights = _ffn(case, goal.active_TF)
    first_FD, up_FD = projections(weights)
    act_FT, fired = gate.gate(x_TD, first_FD, None, 0.0)
    check_gate(case, x_TD, first_FD, act_FT)
    source = gate_up.DenseGate(act_FT)
    rows = _gate_up(case)
    chosen = rows(x_TD, fired, source, up_FD)
    active = int(chosen.total)
    check_rows(case, x_TD, fired.mask_W, source, weights, chosen)
    check_down(case, weights, chosen, exact_ffn(x_TD, weights)[0])

    up = partial(rows, x_TD, fired, source)
    gates = [_matrix(case) for _ in range(kernels_timing.copies(case.f * row_bytes, case.device))]
    runs: list[Any] = [partial(gate.gate, x_TD, w, None, 0.0) for w in gates]
    yield _timed("gate", runs, against.gate, case.f * row_bytes)
    ups = [_matrix(case) for _ in range(kernels_timing.copies(active * row_bytes, case.device))]
    if up_FD is not None:
        yield _timed("up", [partial(up, w) for w in ups], against.up, active * row_bytes)
    norm = (weights.x1_norm_F, weights.x1_norm_eps)
    runs = [partial(down.down, chosen, w, None, *norm) for w in ups]
    yield _timed("down", runs, against.down, active * row_bytes)
    del gates, ups, runs
    read = (case.f + (case.matrices - 1) * active) * row_bytes
    runs = [partial(exact_ffn, x_TD, w) for w in _ffns(case, goal.active_TF, read)]
    yield _timed("exact", runs, against.whole, read)
    del runs
    for number, dtype in enumerate(FORMATS):
        yield from _predicted(case, against, goal, x_TD, weights, dtype, with_cascade=number == 0)


def _predicted(
    case: Case,
    against: Dense,
    goal: kernels_problem.Targets,
    x_TD: Tensor,
    weights: FFN,
    dtype: str,
    *,
    with_cascade: bool,
) -> Iterator[Timed]:
    """Check and time the predicted path with a predictor in `dtype`."""
    if dtype != "f16" and (case.d % BLOCK or case.rank % BLOCK):
        return
    row_bytes = case.d * case.dtype.itemsize

    def new_predictor() -> PredictorWeights:
        return kernels_problem.predictor(goal.predicted_TF, case.d, case.rank, dtype, case.dtype)

    ours = new_predictor()
    named, chosen_F = predictor.predict(x_TD, *ours[:3])
    check_predictor(case, x_TD, ours)
    first_FD, up_FD = projections(weights)
    source = gate_up.SelectedGate(first_FD, None, 0.0, chosen_F)
    rows = _gate_up(case)
    chosen = rows(x_TD, named, source, up_FD)
    check_rows(case, x_TD, named.mask_W, source, weights, chosen)
    check_down(case, weights, chosen, predicted_ffn(x_TD, x_TD, weights, ours)[0])
    predicted = int(chosen.total)
    fired = int((active_list.unpacked(chosen)[1] != 0).any(1).sum())
    own = sum(w.nbytes for w in (ours.fc1_RD, ours.fc2_FR))
    cascade = (predicted + (case.matrices - 2) * fired) * row_bytes
    read = own + cascade + fired * row_bytes

    predictors = [new_predictor() for _ in range(kernels_timing.copies(own, case.device))]
    runs: list[Any] = [partial(predictor.predict, x_TD, *p[:3]) for p in predictors]
    yield _timed(f"predictor {dtype}", runs, None, own)
    ffns = _ffns(case, goal.active_TF, cascade if with_cascade else read)
    if with_cascade:
        runs = [
            partial(rows, x_TD, named, source._replace(first_FD=first_FD), up_FD)
            for first_FD, up_FD in map(projections, ffns)
        ]
        yield _timed("cascade", runs, None, cascade)
    runs = [
        partial(predicted_ffn, x_TD, x_TD, w, predictors[i % len(predictors)])
        for i, w in enumerate(ffns)
    ]
    yield _timed(f"predicted {dtype}", runs, against.whole, read)


def _gate_up(case: Case) -> Callable[..., active_list.ActiveList]:
    return partial(gate_up.gate_up, relu_up=False, squared=case.act == "relu2")


def _timed(
    step: str, runs: Sequence[Callable[[], object]], dense_us: float | None, read: float
) -> Timed:
    return Timed(step, kernels_timing.microseconds(runs), dense_us, read)


def _fastest(
    steps: Sequence[Callable[..., Tensor]], arguments: Sequence[tuple[Tensor, ...]]
) -> float:
    sides = [side for step in steps for side in (step, torch.compile(step, dynamic=False))]
    return min(kernels_timing.microseconds([partial(run, *a) for a in arguments]) for run in sides)


def _ffns(case: Case, active_TF: Tensor, read: float) -> list[FFN]:
    count = kernels_timing.copies(read, case.device)
    return [_ffn(case, active_TF) for _ in range(count)]


def _ffn(case: Case, active_TF: Tensor) -> FFN:
    return kernels_problem.ffn(
        active_TF, case.d, case.dtype, case.matrices, case.act, x1_norm=case.x1_norm
    )


def _matrix(case: Case) -> Tensor:
    return kernels_problem.matrix(case.f, case.d, case.dtype, case.device)


def as_row(case: Case, timed: Timed, copy_gb_per_s: float) -> dict[str, Any]:
    """One row of the JSON report."""
    rate = timed.read_bytes / timed.us / 1e3
    path = timed.step.split()[0]
    auto = None
    if path in ("exact", "predicted"):
        own = case.sparsity
        if path == "predicted":
            own = max(0.0, 1 - (1 - own) * kernels_problem.PREDICTED_PER_ACTIVE)
        shape = (case.d, case.f, case.matrices)
        rank = case.rank if path == "predicted" else None
        most = max_tokens(path, own, device=case.device.type, shape=shape, rank=rank)
        auto = most >= case.tokens
    return {
        "shape": case.name,
        "step": timed.step,
        "sparsity": case.sparsity,
        "batch": case.tokens,
        "us": timed.us,
        "dense_us": timed.dense_us,
        "speedup": timed.dense_us and timed.dense_us / timed.us,
        "gb_per_s": rate,
        "of_copy_bandwidth": rate / copy_gb_per_s,
        "auto": auto,
    }
