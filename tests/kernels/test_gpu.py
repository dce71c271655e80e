"""What runs otherwise on a GPU: large rows, graphs, torch.compile, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

from sparsecast.cli.bench import kernels_problem
from sparsecast.core.ggml_blocks import quantize_q8_0_input
from sparsecast.kernels.ops import predictor
from sparsecast.kernels.ops.ffn import exact_ffn, predicted_ffn
from sparsecast.kernels.ops.int8_dot import quantize_input
from sparsecast.kernels.ops.quantized import dequantized, quantized

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FORMATS = ["f16", "q8_0", "q4_0"]
SHAPES = [(1536, 3840, 384), (4096, 11008, 1024), (5120, 13824, 1280), (200, 130, 32)]
SQUARED = [((2560, 18432, 640), 2, False), ((2560, 6912, 640), 3, True), ((256, 130, 32), 3, True)]
"""AFM-4.5B and BitNet b1.58 2B: shape, matrices, and whether there is a norm of x1."""
STORED = [
    (shape, name) for shape in SHAPES for name in FORMATS if name == "f16" or shape[0] % 32 == 0
]
"""Rows of 200 have no blocks."""


def both(x, weights, named):
    return exact_ffn(x, weights) + predicted_ffn(x, x, weights, named)


@pytest.fixture
def case(device):
    def make(shape, tokens, dtype, stored="q4_0", matrices=3, act="relu", x1_norm=False):
        d, f, rank = shape
        goal = kernels_problem.targets(f, tokens, 0.89, device)
        x = kernels_problem.inputs(tokens, d, dtype, device)
        named = kernels_problem.predictor(goal.predicted_TF, d, rank, stored, dtype)
        weights = kernels_problem.ffn(goal.active_TF, d, dtype, matrices, act, x1_norm=x1_norm)
        return x, weights, named

    return make


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "stored"), STORED, ids=str)
def test_it_is_the_reference_at_the_models_sizes(shape, dtype, tokens, stored, case, decided, near):
    agrees(*case(shape, tokens, dtype, stored), decided, near)


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", SQUARED, ids=str)
def test_relu2_and_a_norm_are_the_reference(form, dtype, tokens, case, decided, near):
    shape, matrices, x1_norm = form
    x, weights, named = case(shape, tokens, dtype, "q4_0", matrices, "relu2", x1_norm)
    agrees(x, weights, named, decided, near)
    for got, again in zip(both(x, weights, named), both(x, weights, named), strict=True):
        assert torch.equal(got, again)


def agrees(x, weights, named, decided, near):
    y, union, predicted_y, predicted = both(x, weights, named)
    want, want_union = decided(x, weights)
    near(y, want)
    assert union == want_union
    want, want_union = decided(x, weights, x, named)
    near(predicted_y, want)
    assert predicted == want_union


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("rank", [160, 256, 1024, 1280])
def test_it_decides_as_its_reference_where_logits_are_dense(rank, tokens, stored, device):
    """Predictors of a problem keep away from the threshold, and so would hide a wrong sum."""
    hidden = torch.randn(tokens, rank, device=device).relu()
    weight = torch.randn(11008, rank, device=device) * rank**-0.5
    fc2 = weight.bfloat16() if stored == "f16" else quantized(weight, stored)

    met = hidden.bfloat16() if stored == "f16" else hidden
    torch.cuda.synchronize()  # or fc2 might be read before it is made
    _, chosen = predictor.select(met, fc2, 0.0)

    hidden = predictor.rounded_input(hidden, predictor.input_dtype(fc2)).double()
    logits = hidden @ dequantized(fc2).double().T
    got = ((chosen >> torch.arange(tokens, device=device)[:, None]) & 1).bool()
    assert (logits[got != (logits >= 0)].abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inputs_get_the_codes_that_torch_gives_them(dtype, device):
    """Both by the same rule; a million of them, with zeros and what is next to nothing."""
    x = torch.randn(16, 65536, device=device) * torch.logspace(-3, 3, 16, device=device)[:, None]
    x[3, :4096], x[4, :64] = 0, 1e-30
    x = x.to(dtype)
    got = quantize_input(x)
    scale, code = quantize_q8_0_input(x)
    assert torch.equal(got[..., :8].contiguous().view(torch.int8).float(), code)
    assert torch.equal(got[..., 8].view(torch.float32), scale)


@pytest.mark.parametrize("act", ["relu", "relu2"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_graph_takes_new_inputs_and_gives_the_same_bits(tokens, act, case):
    shape, normed = (1536, 3840, 384), act == "relu2"
    x, weights, named = case(shape, tokens, torch.bfloat16, "q4_0", 3, act, normed)
    static = x.clone()
    both(static, weights, named)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both(static, weights, named)
    for scale in (1, 0.5, 0, -1):
        static.copy_(x * scale)
        graph.replay()
        for got, want in zip(out, both(x * scale, weights, named), strict=True):
            assert torch.equal(got, want)


def test_the_host_never_waits(case):
    x, weights, named = case((1536, 3840, 384), 1, torch.bfloat16)
    both(x, weights, named)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(x, weights, named)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inductor_takes_the_operators(case):
    x, weights, named = case((1536, 3840, 384), 2, torch.bfloat16)
    compiled = torch.compile(lambda x: both(2 * x, weights, named), fullgraph=True)
    for got, want in zip(compiled(x), both(2 * x, weights, named), strict=True):
        assert torch.equal(got, want)
