"""No kernel touches what another one writes before it has waited for it (launch.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

WEIGHTS = {"weight", "scale"}
DOWN = {"down 1 of 1536", "down 1 of 5120", "down 1 of 1536 norm"}
"""One token's last kernel. It waits for list entries instead."""
BATCH_DOWN = {"down 16", "down 16 norm"}
FIRST = {"codes", "gate 1", "gate 16", "hidden 1", "hidden 16"}
"""The kernels that can be the first of an FFN."""
SELECTING = {"gate 1", "select 1", "select 1 q8_0", "select 1 q4_0"}
"""They blank one token's list."""
WRITERS = {"rows 1", "up 1"}
"""They fill one token's list."""


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, object]]:
    """Return what listing.py finds in each kernel, for 1 token and for several."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("listing.py"))],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_role_has_its_kernels(kernels):
    """A renamed kernel must not drop out of the tests below."""
    assert kernels.keys() >= DOWN | FIRST | SELECTING | WRITERS | BATCH_DOWN
    assert len(kernels) == 33


def test_a_kernel_reads_only_weights_and_writes_nothing_before_it_waits(kernels):
    for name, kernel in kernels.items():
        assert kernel["waits"] >= 1, name
        assert kernel["written"] == [], name
        assert set(kernel["read"]) <= ({"down", "norm", "entry"} if name in DOWN else WEIGHTS), name


def test_one_tokens_list_is_written_whole_by_atomics_and_read_past_the_l1(kernels):
    """Only a GPU can show that polling it works."""
    allowed = {
        **dict.fromkeys(SELECTING, r"st\.global\.b64"),
        **dict.fromkeys(WRITERS, r"atom\.global\.gpu\.relaxed\.exch\.b64"),
        **dict.fromkeys(DOWN, r"ld\.global\.cg\.b64|ld\.relaxed\.gpu\.global\.b64"),
    }
    touching = {name: kernel["entry"] for name, kernel in kernels.items() if kernel["entry"]}
    assert touching.keys() == allowed.keys()
    for name, operations in touching.items():
        assert all(re.fullmatch(allowed[name], operation) for operation in operations), name


def test_first_kernels_and_writers_of_the_list_start_nothing_before_they_wait(kernels):
    """Else the next kernel could read the FFN's inputs, or poll a list that is not blank yet."""
    early = {name for name, kernel in kernels.items() if kernel["starts_early"]}
    assert not early & (FIRST | WRITERS)


def test_the_last_kernel_starts_nothing(kernels):
    assert {kernels[name]["starts_early"] for name in DOWN | BATCH_DOWN} == {None}
