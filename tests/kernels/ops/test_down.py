"""The down projection over a list: any length, any width, and tickets that come back as zero."""

from __future__ import annotations

import pytest
import torch

from sparsecast.kernels.ops import active_list, down


@pytest.fixture
def listed(banded):
    """A list of `total` of f neurons, half of whose x1 are zero for some token or for all."""

    def make(f, total, tokens, dtype):
        count, ticket = banded(torch.tensor(total, dtype=torch.int32)), banded(torch.zeros(8).int())
        if tokens == 1:
            row = torch.randperm(f)[:total].sort().values
            x1 = (torch.randn(total) * (torch.rand(total) < 0.7)).to(dtype).float()
            x1[::3] = 0
            entry = torch.full((f + 1,), -1)
            entry[:total] = row << 32 | x1.view(torch.int32).long() & 0xFFFFFFFF
            entry[-1] = total
            return active_list.EntryList(banded(entry), count, ticket)
        row = torch.empty(f, dtype=torch.int32)
        row[:total] = torch.randperm(f)[:total].sort().values
        x1 = torch.empty(f, tokens, dtype=dtype)
        x1[:total] = torch.randn(total, tokens) * (torch.rand(total, tokens) < 0.7)
        x1[:total:3] = 0
        return active_list.BatchList(banded(row), banded(x1), count, ticket)

    return make


@pytest.mark.parametrize("total", [0, 1, 63, 700])
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_sums_the_listed_rows(dtype, tokens, total, listed, banded, near, monkeypatch):
    monkeypatch.setitem(down.CONFIG, "GROUPS", 4)  # so few that each has several tiles
    monkeypatch.setattr(down, "ONE_TOKEN_GROUPS", 4)
    f, d = 700, 130
    weight = banded(torch.randn(f, d).to(dtype))
    chosen = listed(f, total, tokens, dtype)
    row, x1 = active_list.unpacked(chosen)
    read = row[(x1 != 0).any(1)].long()
    unread = torch.ones(f, dtype=torch.bool).scatter(0, read.cpu(), False)
    want = down.reference(chosen, weight, None)
    weight[unread] = torch.nan

    got = down.down(chosen, weight, None)

    near(got, want)
    assert not chosen.ticket_C.any()
    assert torch.equal(down.down(chosen, weight, None), got)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("total", [0, 20])
def test_a_bias_is_added_once(total, tokens, listed, banded, near):
    dtype, d = torch.float16, 33
    weight, bias = (banded(torch.randn(*s).to(dtype)) for s in ((40, d), (d,)))
    chosen = listed(40, total, tokens, dtype)

    near(down.down(chosen, weight, bias), down.reference(chosen, weight, bias))


def test_few_programs_share_a_wide_hidden_size():
    for d, groups in ((128, 24), (5120, 24), (8192, 16), (16384, 8), (10**6, 1)):
        assert down._one_token_config(d)["GROUPS"] == groups
    for d, groups in ((5120, 16), (8192, 16), (16384, 8), (10**6, 1)):
        assert down._config(d)["GROUPS"] == groups
