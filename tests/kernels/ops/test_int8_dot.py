"""Inputs in q8_0, and products of codes by codes."""

from __future__ import annotations

import pytest
import torch

from sparsecast.core.ggml_blocks import quantize_q8_0_input, round_to_q8_0
from sparsecast.kernels.ops import predictor
from sparsecast.kernels.ops.int8_dot import quantize_input
from sparsecast.kernels.ops.quantized import Quantized, dequantized, quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [32, 96, 1056])
def test_inputs_are_rounded_as_torch_rounds_them(columns, dtype, banded, values):
    x = torch.randn(5, columns)
    x[0, :32] = 0
    x[1, :32] = torch.arange(32) * 1e-41
    x[2, :32] = torch.arange(-127, 127, 8) / 2  # ties: 127 / 63.5 is 2, then odd and even halves
    x[2, 1:32] += 0.25
    x[3, :32] = 3e4 * torch.randn(32).clamp(-2, 2)
    x = banded(x.to(dtype))

    got = quantize_input(x)

    scale, code = quantize_q8_0_input(x)
    assert torch.equal(got[..., :8].contiguous().view(torch.int8).float(), code)
    assert torch.equal(got[..., 8].view(torch.float32), scale)
    assert torch.equal(values(got), round_to_q8_0(x))
    assert not values(got)[0, :32].any()
    fraction = (x[2, :32].float() * (127 / x[2, :32].float().abs().max())).frac().abs()
    assert (fraction == 0.5).sum() > 10


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_the_largest_codes_meet_exactly(dtype, tokens, banded):
    """Whole numbers below 2^24: what comes out must be the product, to the last bit."""
    signs = torch.tensor([-1.0, 1.0])[torch.randint(0, 2, (64, 96))]
    largest = {"q8_0": 127, "q4_0": -8}[dtype]
    weight = signs * abs(largest)
    weight[:, ::32] = largest  # decides on a block's scale: 1
    fc1 = Quantized(*map(banded, quantized(weight, dtype)))
    assert fc1.scale_NB.eq(1).all()
    z = torch.tensor([-127.0, 127.0])[torch.randint(0, 2, (tokens, 96))]

    hidden = predictor.hidden(banded(z), fc1).cpu()

    exact = (z @ dequantized(fc1).cpu().T).relu()
    assert torch.equal(hidden, exact)
    assert (exact > 1e4).any()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_the_sum_of_a_block_is_the_same_in_every_batch(dtype, banded):
    """So are decisions, bit for bit, where a row is one block."""
    fc1, fc2 = (
        Quantized(*map(banded, quantized(torch.randn(*shape) * 0.1, dtype)))
        for shape in ((32, 32), (100, 32))
    )
    z = banded(torch.randn(16, 32))
    _, together = predictor.predict(z, fc1, fc2, 0.0)
    for t in (0, 5, 15):
        _, alone = predictor.predict(z[t : t + 1], fc1, fc2, 0.0)
        assert torch.equal(alone, (together >> t) & 1)


def test_more_tokens_than_a_kernel_takes_are_refused():
    with pytest.raises(ValueError, match="holds 17 tokens, expected 1 to 16"):
        quantize_input(torch.zeros(17, 32))
