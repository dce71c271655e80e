"""Runs that are killed at random moments end with the bytes of one that nobody disturbed."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.faults.conftest import Stage, end_group

STAGES = ["collect", "train", "sparsify", "export", "report", "evaluate"]
KILLS = 20


def kill_at(stage: Stage, seconds: float, number: int = signal.SIGKILL):
    """Start the stage, send it a signal so much later, and return it when it has ended."""
    process = stage.run()
    process.process.join(seconds)
    if process.poll() is None:
        end_group(process, number)
    process.process.join(60)
    assert process.poll() is not None
    return process


def assert_whole_or_absent(stage: Stage, whole: dict[str, bytes]) -> None:
    """The output, if there is one, is that of a finished run."""
    if stage.out.exists():
        assert stage.content() == whole


def timed(stage: Stage) -> tuple[dict[str, bytes], float]:
    """The output of an undisturbed run, and its seconds."""
    stage.finish()  # the first of its kind also fills caches
    stage.clear()
    began = time.monotonic()
    whole = stage.finish()
    seconds = time.monotonic() - began
    stage.clear()
    return whole, seconds


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_twenty_kills_change_no_byte(stage, name):
    one = stage(name)
    whole, seconds = timed(one)
    draw, hits, starts = random.Random(name), 0, 0
    while hits < KILLS:
        ended = kill_at(one, draw.uniform(0, seconds))
        starts += 1
        assert starts < 10 * KILLS, "hardly a kill has met a run"
        assert_whole_or_absent(one, whole)
        if ended.returncode != -signal.SIGKILL:
            assert ended.returncode == 0, ended.communicate()[1]
            assert one.content() == whole
            assert one.left() == [one.out.name]
            one.clear()
        hits += ended.returncode == -signal.SIGKILL
    assert one.finish() == whole
    assert one.left() == [one.out.name]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", STAGES)
def test_a_signal_is_answered_in_one_line_and_changes_no_byte(stage, name, number):
    one = stage(name)
    whole, seconds = timed(one)
    draw, hits = random.Random(name), 0
    for _ in range(30):
        ended = kill_at(one, draw.uniform(0.2 * seconds, seconds), number)
        assert_whole_or_absent(one, whole)
        code = ended.returncode
        if code == 0:
            assert one.content() == whole
            one.clear()
            continue
        told = ended.communicate()[1]
        if code == -signal.SIGTERM and not told:  # before the program has begun
            continue
        assert code == 128 + number, told
        lines = [line for line in told.splitlines() if line.startswith("sparsecast: ")]
        assert len(lines) == 1, told
        assert "interrupted" in lines[0]
        assert "Traceback" not in told
        hits += 1
        if hits == 4:
            break
    assert hits == 4
    assert one.finish() == whole
    assert one.left() == [one.out.name]
