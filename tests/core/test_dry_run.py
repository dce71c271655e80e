"""How a forecast is put together and shown."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.core import dry_run, memory
from sparsecast.core.dry_run import Forecast, check_forecast, extrapolate, show_forecast, timed
from sparsecast.core.errors import InputError

CPU = torch.device("cpu")


@given(st.integers(1, 100), st.floats(0, 1e3), st.floats(0, 1e3))
def test_what_is_linear_is_found_again(layers, outer, each):
    for counts in ((1, 2), (2, 4)):
        measured = {count: outer + count * each for count in counts}
        assert extrapolate(layers, measured) == pytest.approx(outer + layers * each, abs=1e-6)


def test_one_measurement_and_noise_give_no_negative_slope():
    assert extrapolate(1, {1: 3.0}) == 3.0
    assert extrapolate(9, {1: 3.0, 2: 2.9}) == 3.0


def test_long_work_is_done_once(monkeypatch):
    done = []
    monkeypatch.setattr(dry_run, "LONG", 0)
    timed(lambda: done.append(1), CPU)
    assert len(done) == 1
    monkeypatch.setattr(dry_run, "LONG", 60)
    timed(lambda: done.append(1), CPU)
    assert len(done) == 2 + dry_run.MOST


def test_the_table_adds_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "host_available", lambda: 7_000_000)
    found = Forecast(
        what="acts: collect",
        out=tmp_path / "acts",
        disk=123_000_000,
        device=CPU,
        host={"weights": 2_000_000, "a batch": 1_000_000, "shards": 0},
        pages=500_000,
        seconds={"loading": 59.0, "recording": 3601.0},
        note="measured",
    )

    show_forecast(found)

    told = re.sub(r" +", " ", capsys.readouterr().err)
    for line in (
        "acts: collect: a dry run, nothing is written",
        "disk 123 MB, ",
        "host memory 3.5 MB, 7 MB are free",
        " weights 2 MB",
        " mapped files, if there is room 500 kB",
        "device memory none, it runs on the CPU",
        "time 1:01:00, measured",
        " loading 0:00:59",
    ):
        assert line in told
    assert "shards" not in told
    monkeypatch.setattr(memory, "host_limit", lambda: 2_900_000)
    with pytest.raises(InputError, match="acts: collect needs 3 MB of memory"):
        check_forecast(found, "less")
