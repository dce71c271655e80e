"""Kernels that run while others do, on a GPU.

Their memory is as torch gives it: filling it with poison, as in other tests, would keep `down` from
starting beside `rows`.
"""

from __future__ import annotations

import os
import time
from functools import partial

import pytest
import torch

from sparsecast.cli.bench import kernels_problem
from sparsecast.kernels.ops import active_list, down
from sparsecast.kernels.ops.ffn import (
    exact_ffn,
    exact_reference,
    predicted_ffn,
    predicted_reference,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = [(1536, 3840, 384), (4096, 11008, 1024), (5120, 13824, 1280)]
LONG = 30
"""Seconds, after which a kernel that waits is taken for one that waits forever."""


@pytest.fixture(autouse=True)
def _banded_memory():
    pass


@pytest.fixture
def case(device):
    """An FFN of its own on one token: exact, exact with ReLU² and a norm of x1, behind f16, and
    behind q4_0, and their references."""

    def make(shape):
        d, f, rank = shape
        goal = kernels_problem.targets(f, 1, 0.89, device)
        x = kernels_problem.inputs(1, d, torch.bfloat16, device)
        weights = kernels_problem.ffn(goal.active_TF, d, torch.bfloat16)
        named = [
            kernels_problem.predictor(goal.predicted_TF, d, rank, stored, torch.bfloat16)
            for stored in ("f16", "q4_0")
        ]
        normed = kernels_problem.ffn(goal.active_TF, d, torch.bfloat16, 3, "relu2", x1_norm=True)
        exact = [
            (partial(exact_ffn, x, w), partial(exact_reference, x, w)) for w in (weights, normed)
        ]
        return exact + [
            (
                partial(predicted_ffn, x, x, weights, n),
                partial(predicted_reference, x, x, weights, n),
            )
            for n in named
        ]

    return make


@pytest.fixture
def alone(near):
    """What every FFN gives by itself, as its reference does."""

    def run(cases):
        out = []
        for ffn, reference in cases:
            torch.cuda.synchronize()
            y, count = ffn()
            torch.cuda.synchronize()
            want, want_count = reference()
            near(y, want)
            assert count == want_count
            out.append((y, count))
        return out

    return run


def same(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif("CUDA_LAUNCH_BLOCKING" in os.environ, reason="would wait for itself")
@pytest.mark.parametrize("last", ["total", "entry"])
@pytest.mark.parametrize("total", [1, 40, 300])
def test_the_down_projection_waits_for_every_entry(total, last, device):
    """It starts on a blank list, which is filled under it, the total first or last, and an entry
    that counts in the end or before that."""
    f, d = 400, 5120
    weight = torch.randn(f, d, device=device).bfloat16()
    row = torch.randperm(f)[:total].sort().values
    x1 = torch.randn(total).bfloat16().float()
    entry = torch.full((f + 1,), -1, device=device)
    whole = torch.full((f + 1,), -1)
    whole[:total] = row << 32 | x1.view(torch.int32).long() & 0xFFFFFFFF
    whole[-1] = total
    whole = whole.to(device)
    count = torch.tensor(total, dtype=torch.int32, device=device)
    ticket = torch.zeros(128, dtype=torch.int32, device=device)
    done = active_list.EntryList(whole, count, ticket)
    want = down.down(done, weight, None)  # and the kernel is compiled
    near_by = down.reference(done, weight, None)
    assert (want.double() - near_by).abs().max() <= 1e-2 * near_by.abs().max()

    pinned = whole.cpu().pin_memory()  # copied without a kernel, which might wait for the other
    reads, writes = torch.cuda.Stream(), torch.cuda.Stream()
    chunks = torch.arange(f + 1).chunk(8)
    torch.cuda.synchronize()
    with torch.cuda.stream(reads):
        got = down.down(active_list.EntryList(entry, count, ticket), weight, None)
        read = torch.cuda.Event()
        read.record()
    with torch.cuda.stream(writes):
        missing = {*range(total), f}
        order = [*torch.randperm(6).add(1).tolist(), 0]
        for number in [*order, 7] if last == "total" else [7, *order]:
            time.sleep(0.002)
            assert not missing or not read.query(), "it did not wait"
            places = chunks[number].tolist()
            some = slice(places[0], places[-1] + 1)
            entry[some].copy_(pinned[some], non_blocking=True)
            missing -= {*places}
    writes.synchronize()
    late = time.monotonic() + LONG
    while not read.query():
        if time.monotonic() > late:  # nothing else can run on the GPU beside it, or end it
            pytest.exit("the down projection waits for what is there", returncode=1)
        time.sleep(0.01)
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token_gives_the_same_bits_beside_other_work(shape, case, alone):
    """Kernels of a second stream take the places and the memory that those of the first expect."""
    cases = case(shape)
    want = alone(cases)
    aside, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    for _ in range(200):
        with torch.cuda.stream(aside):
            noise = (noise @ noise).clamp(-1, 1)
        for (ffn, _), expected in zip(cases, want, strict=True):
            assert same(ffn(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ffns_of_a_graph_do_not_read_each_others_lists(shape, case, alone):
    """A graph's FFNs follow each other in the same memory, where the last one's list still lies."""
    cases = [one for _ in range(3) for one in case(shape)]
    want = alone(cases)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [ffn() for ffn, _ in cases * 4]
    for _ in range(50):
        graph.replay()
        torch.cuda.synchronize()
        for one, expected in zip(got, want * 4, strict=True):
            assert same(one, expected)
