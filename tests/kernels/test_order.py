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
    assert len(told) == 20
    for name, kernel in told.items():
        assert kernel["waits"] >= 1, name
        assert kernel["written"] == [], name
        assert set(kernel["read"]) <= {"weight", "scale"}, name


def test_a_predictors_matrices_are_on_their_way_before_that(told):
    """With one token; the first kernel of an FFN waits before all else."""
    early = {name for name, kernel in told.items() if kernel["read"]}
    assert early == {
        "select 1", "hidden 1 q8_0", "hidden 1 q4_0", "select 1 q8_0", "select 1 q4_0",
    }  # fmt: skip
