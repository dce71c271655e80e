"""x1 of a set's neurons: exact, behind a prediction, and without a gate."""

from __future__ import annotations

import pytest
import torch

from sparsecast.kernels.ops import active_list, bitmask, gate, gate_up
from sparsecast.kernels.ops.active_list import Selection

D = 100
SETS = ["none", "first", "last", "some", "all"]


@pytest.fixture
def selected(banded):
    """A set, and for one token the room for its list."""

    def make(on_F, tokens):
        padded = torch.zeros(-(-len(on_F) // 16) * 16, dtype=torch.int64)
        padded[: len(on_F)] = on_F
        word = (padded.view(-1, 16) << torch.arange(16)).sum(1)
        mask_W = banded(torch.where(word < 2**15, word, word - 2**16).to(torch.int16))
        blank_E = banded(torch.full((len(on_F) + 1,), -1)) if tokens == 1 else None
        return Selection(mask_W, blank_E)

    return make


def chosen_set(name: str, f: int) -> torch.Tensor:
    on = torch.zeros(f, dtype=torch.bool)
    if name == "some":
        on = torch.rand(f) < 0.3
    elif name != "none":
        on[{"first": slice(1), "last": slice(f - 1, f), "all": slice(f)}[name]] = True
    return on


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("f", [130, 16, 5])
def test_only_the_sets_rows_are_listed_and_right(f, tokens, name, matrix, banded, selected, near):
    dtype = torch.float16
    on = chosen_set(name, f)
    act = banded((torch.rand(f, tokens) + 0.1).to(dtype) * on[:, None])
    x, up = banded(torch.randn(tokens, D).to(dtype)), matrix(f, D, dtype)
    up[~on] = torch.nan  # whoever reads these tells

    got = gate_up.gate_up(x, selected(on, tokens), gate_up.DenseGate(act), up, relu_up=False)

    row, x1 = gate_up.reference(x, on.to(x.device), gate_up.DenseGate(act), up, False)
    assert int(got.total) == on.sum()
    got_row, got_x1 = active_list.unpacked(got)
    assert torch.equal(got_row, row.int())
    near(got_x1.to(dtype), x1)
    assert not got.ticket_C.any()
    if tokens == 1:
        assert torch.equal(got_x1, got_x1.to(dtype).float())
        assert (got.entry_E[len(row) : -1] == -1).all()


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("relu_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_cascade_reads_up_where_the_gate_fired(
    dtype, relu_up, tokens, matrix, banded, selected, near
):
    f = 50
    x = banded(torch.randn(tokens, D).to(dtype))
    first, up = matrix(f, D, dtype), matrix(f, D, dtype)
    chosen_TF = torch.rand(tokens, f) < 0.5
    bit = 1 << torch.arange(tokens, dtype=torch.int32)
    chosen = banded((chosen_TF.int() * bit[:, None]).sum(0, dtype=torch.int32))
    on = chosen_TF.any(0)
    source = gate_up.SelectedGate(first, None, 0.25, chosen)
    row, act = gate_up.reference(x, on.to(x.device), source, None, False)
    want = gate_up.reference(x, on.to(x.device), source, up, relu_up)[1]
    first[~on], up[~on] = torch.nan, torch.nan
    up[row[~(act != 0).any(1)]] = torch.nan

    got_row, got_x1 = active_list.unpacked(
        gate_up.gate_up(x, selected(on, tokens), source, up, relu_up=relu_up)
    )

    assert torch.equal(got_row, row.int())
    near(got_x1.to(dtype), want)
    assert tokens > 1 or torch.equal(got_x1, got_x1.to(dtype).float())
    assert (got_x1[~chosen_TF.T[on]] == 0).all()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("predicted", [False, True])
def test_without_a_gate_x1_is_what_fired(predicted, tokens, matrix, banded, selected, near):
    dtype, f = torch.bfloat16, 40
    x, first = banded(torch.randn(tokens, D).to(dtype)), matrix(f, D, dtype)
    bias = banded(torch.randn(f).to(dtype))
    act, chosen_set = gate.gate(x, first, bias, 0.0)
    source = gate_up.DenseGate(act)
    if predicted:
        on = torch.rand(f) < 0.5
        chosen_set, chosen = selected(on, tokens), banded(on.int() * (2**tokens - 1))
        source = gate_up.SelectedGate(first, bias, 0.0, chosen)

    got_row, got_x1 = active_list.unpacked(
        gate_up.gate_up(x, chosen_set, source, None, relu_up=False)
    )

    row, want = gate_up.reference(x, bitmask.reference(chosen_set.mask_W, f), source, None, False)
    assert torch.equal(got_row, row.int())
    near(got_x1.to(dtype), want)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("d", [2100, 4096, 5120, 8192])
def test_one_tokens_blocks_are_right_at_every_hidden_size(
    d, predicted, matrix, banded, selected, near
):
    dtype, f = torch.float16, 20
    on = torch.rand(f) < 0.5
    x, first, up = banded(torch.randn(1, d).to(dtype)), matrix(f, d, dtype), matrix(f, d, dtype)
    act = banded((torch.rand(f, 1) + 0.1).to(dtype) * on[:, None])
    source = (
        gate_up.SelectedGate(first, None, 0.0, banded(on.int()))
        if predicted
        else gate_up.DenseGate(act)
    )

    got = gate_up.gate_up(x, selected(on, 1), source, up, relu_up=False)

    _, want = gate_up.reference(x, on.to(x.device), source, up, False)
    near(active_list.unpacked(got)[1].to(dtype), want)


def test_a_selection_is_of_as_many_tokens_as_the_input(matrix, banded, selected):
    x, up = banded(torch.randn(2, D).half()), matrix(20, D, torch.float16)
    act = banded(torch.ones(20, 2).half())
    with pytest.raises(AssertionError, match="selection: expected one for 2 tokens"):
        gate_up.gate_up(x, selected(act[:, 0] > 0, 1), gate_up.DenseGate(act), up, relu_up=False)
