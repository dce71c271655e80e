"""No kernel touches what another one writes before it has waited for it (launch.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WEIGHTS = {"weight", "scale"}
DOWN = {"down 1 of 1536", "down 1 of 5120"}
"""One token's last kernel waits for entries instead."""


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
    assert len(told) == 31
    for name, kernel in told.items():
        assert kernel["waits"] >= 1, name
        assert kernel["written"] == [], name
        assert set(kernel["read"]) <= ({"down", "entry"} if name in DOWN else WEIGHTS), name


def test_a_predictors_matrices_are_on_their_way_before_that(told):
    """Up to 4 tokens; the first kernel of an FFN waits before all else."""
    early = {name for name, kernel in told.items() if kernel["read"]}
    of_codes = {
        f"{which} {pad} {kind}"
        for which in ("hidden", "select")
        for pad in (1, 2, 4)
        for kind in ("q8_0", "q4_0")
    }
    assert early == {"select 1"} | DOWN | of_codes


def test_one_tokens_list_is_blanked_then_written_and_read_past_the_l1(told):
    """Blanked by who selects; whole entries everywhere. That polls work, only a GPU can tell."""
    touched = {name: kernel["entry"] for name, kernel in told.items() if kernel["entry"]}
    blanks = {"gate 1", "select 1", "select 1 q8_0", "select 1 q4_0"}
    assert touched == {
        **dict.fromkeys(blanks, ["st.global.b64"]),
        **dict.fromkeys(("rows 1", "up 1"), ["atom.global.gpu.relaxed.exch.b64"]),
        **dict.fromkeys(DOWN, ["ld.global.cg.b64", "ld.relaxed.gpu.global.b64"]),
    }


def test_who_lets_the_next_kernel_start_before_it_has_waited(told):
    """None that is the first of an FFN, nor who writes one token's list, which must be blank before
    anyone reads it; the last lets none start at all."""
    early = {name for name, kernel in told.items() if kernel["starts_early"]}
    assert early == {
        "codes early", "select 1", "select 16", "rows 16", "up 16",
        "hidden 1 q8_0", "hidden 1 q4_0", "select 1 q8_0", "select 1 q4_0",
    }  # fmt: skip
    never = {name for name, kernel in told.items() if kernel["starts_early"] is None}
    assert never == DOWN | {"down 16"}
