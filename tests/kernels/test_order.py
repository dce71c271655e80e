"""No kernel touches what another one writes before it has waited for it (launch.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, object]]:
    """What listing.py says of every kernel, in one and in 16 columns."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("listing.py"))],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_before_a_kernel_has_waited_it_reads_weights_alone(told):
    assert len(told) == 30
    for name, kernel in told.items():
        assert kernel["waits"] >= 1, name
        assert kernel["written"] == [], name
        assert set(kernel["read"]) <= {"weight", "scale"}, name


def test_a_predictors_matrices_are_on_their_way_before_that(told):
    """Up to 4 tokens; the first kernel of an FFN waits before all else."""
    early = {name for name, kernel in told.items() if kernel["read"]}
    of_codes = {
        f"{which} {pad} {kind}"
        for which in ("hidden", "select")
        for pad in (1, 2, 4)
        for kind in ("q8_0", "q4_0")
    }
    assert early == {"select 1"} | of_codes


def test_who_lets_the_next_kernel_start_before_it_has_waited(told):
    """None that is the first of an FFN, and the last lets none start at all."""
    early = {name for name, kernel in told.items() if kernel["starts_early"]}
    assert early == {
        "codes early", "select 1", "select 16", "rows 1", "rows 16", "up 1", "up 16",
        "hidden 1 q8_0", "hidden 1 q4_0", "select 1 q8_0", "select 1 q4_0",
    }  # fmt: skip
    never = {name for name, kernel in told.items() if kernel["starts_early"] is None}
    assert never == {"down 1", "down 16"}
