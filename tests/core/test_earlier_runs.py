"""Options that an earlier version did not have count as what that version did."""

from __future__ import annotations

import pytest

from sparsecast.core.earlier_runs import compare_options


@pytest.mark.parametrize(
    ("earlier", "now", "told"),
    [
        ({}, "cut", []),
        ({"long_documents": "split"}, "split", []),
        ({"long_documents": "cut"}, "split", ["long_documents was 'cut', now 'split'"]),
        ({"long_documents": "split"}, "cut", ["long_documents was 'split', now 'cut'"]),
        (
            {},
            "split",
            [
                "long_documents was 'cut', now 'split': give --long-documents cut, as runs before "
                "that option did"
            ],
        ),
    ],
)
def test_a_run_without_the_option_has_cut_its_documents(earlier, now, told):
    assert compare_options(earlier | {"a": 1}, {"a": 1, "long_documents": now}) == told
