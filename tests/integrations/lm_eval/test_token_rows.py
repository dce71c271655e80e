"""Rows are cut behind BOS, and one BOS is asserted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.core.errors import InputError
from sparsecast.integrations.lm_eval.token_rows import check_row, cut_behind_bos

BOS = 1
TOKENS = st.lists(st.integers(2, 50), max_size=30)


@given(TOKENS, st.integers(1, 40))
def test_a_cut_row_keeps_bos_and_its_last_tokens(rest, room):
    row = cut_behind_bos([BOS, *rest], room, BOS)
    assert len(row) == min(room, len(rest) + 1)
    assert row[0] == BOS
    assert row[1:] == rest[len(rest) - (len(row) - 1) :]
    check_row(row, BOS)


@given(TOKENS, st.integers(1, 40))
def test_without_bos_the_last_tokens_remain(rest, room):
    assert cut_behind_bos(rest, room, None) == rest[-room:]


def test_no_room_is_one_line():
    with pytest.raises(InputError, match="longer than the model can read; leave the task out"):
        cut_behind_bos([BOS, 5], 0, BOS)


@pytest.mark.parametrize("row", [[], [5, 6], [BOS, BOS, 5], [BOS, 5, BOS], [5, BOS]])
def test_any_other_row_is_refused(row):
    with pytest.raises(AssertionError, match="must begin with one BOS"):
        check_row(row, BOS)


def test_a_template_may_write_bos_between_turns_but_not_twice():
    check_row([BOS, 5, BOS, 6], BOS, inside=True)
    with pytest.raises(AssertionError):
        check_row([BOS, BOS, 5], BOS, inside=True)
    check_row([5, 6], None)
