"""The dense gate: values, decisions, and the set of who fired."""

from __future__ import annotations

import pytest
import torch

from sparsecast.kernels.ops import bitmask, gate

SHAPES = [(100, 130), (33, 17), (600, 40), (64, 16)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_fires_where_the_dense_gate_does(shape, tokens, dtype, matrix, banded, near):
    d, f = shape
    x, weight = banded(torch.randn(tokens, d).to(dtype)), matrix(f, d, dtype)
    bias = banded(torch.randn(f).to(dtype)) if d == 100 else None

    act, fired = gate.gate(x, weight, bias, 0.5)
    want, on = gate.reference(x, weight, bias, 0.5)

    differ = (act != 0) != (want != 0)
    dense = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    at_cut = (dense.T - 0.5).abs() < 0.5 * torch.finfo(dtype).eps
    assert not (differ & ~at_cut).any()
    near(act.masked_fill(differ, 0), want.masked_fill(differ, 0))
    assert fired.blank_E is None if tokens > 1 else (fired.blank_E == -1).all()
    if not differ.any():
        assert torch.equal(bitmask.reference(fired.mask_W, f), on)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.40625])
def test_ties_and_zeros_are_decided_in_the_models_dtype(tokens, threshold, banded):
    """A gate equal to T fires, one of exactly 0 never does, one that rounds up to T does."""
    gates = torch.tensor([0.0, 0.40625, 0.40624, 0.4, -0.40625, 1.0])
    weight = banded(gates[:, None].to(torch.bfloat16).float().to(torch.bfloat16))
    x = banded(torch.ones(tokens, 1, dtype=torch.bfloat16))

    act, _ = gate.gate(x, weight, None, threshold)

    rounded = gates.to(torch.bfloat16)
    fires = (rounded >= threshold) & (rounded > 0)
    assert torch.equal(act, torch.where(fires, rounded, 0)[:, None].expand(-1, tokens).to(act))


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_gate_beside_the_threshold_decides_as_it_rounds(tokens, banded):
    """In bfloat16 1 + 1/512 rounds down to 1, and 1 + 3/512 up to the threshold 1 + 1/128."""
    weight = banded(torch.tensor([[1.0, 2**-9], [1.0, 3 * 2**-9]], dtype=torch.bfloat16))
    x = banded(torch.ones(tokens, 2, dtype=torch.bfloat16))

    act, _ = gate.gate(x, weight, None, 1.0078125)

    assert torch.equal(act[:, 0].float().cpu(), torch.tensor([0.0, 1.0078125]))
