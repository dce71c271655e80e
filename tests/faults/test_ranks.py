"""A rank that dies ends the others within seconds, with one message, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

LIMIT = 30
"""Seconds in which the other ranks must have ended."""
MIDST = {
    "collect": """
from sparsecast.collect import recording
forward, forwards = recording._forward, iter(range(99999))
def slow(*args):
    if os.environ["RANK"] == WHICH and next(forwards) == 2:
        HOW
    return forward(*args)
recording._forward = slow
""",
    "train": """
from sparsecast.predictors.training.trainer import _Epochs
end = _Epochs.on_train_epoch_end
def ended(self, trainer, module):
    end(self, trainer, module)
    if os.environ["RANK"] == WHICH and trainer.current_epoch == 2:
        HOW
_Epochs.on_train_epoch_end = ended
""",
    "sparsify": """
from sparsecast.sparsify.training.lightning_module import SparsifyModule
step = SparsifyModule.training_step
def stepped(self, *args):
    if os.environ["RANK"] == WHICH and self.global_step == 4:
        HOW
    return step(self, *args)
SparsifyModule.training_step = stepped
""",
}
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
BUSY = """
import time
def busy(model, stop, *args):
    if os.environ["RANK"] == WHICH:
        return slow(model, stop, *args)
    for _ in range(20 * 60):
        stop.check()
        time.sleep(0.05)
recording._forward = busy
"""
"""A minute for every batch of the other ranks."""
DEAF = """
import time
from pathlib import Path
IS_DEAF = Path("PLACE")
def deaf(*args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    IS_DEAF.touch()
    time.sleep(60)
def late(*args):
    while not IS_DEAF.exists():
        time.sleep(0.05)
    return slow(*args)
recording._forward = deaf if os.environ["RANK"] == "0" else late
"""
"""Rank 1 is killed once rank 0 hears nothing, not before."""
FAILS = 'raise ValueError("its own trouble")'


def run_ranks(ranks_forked, one, code: str, count: int = 2):
    """The exit codes and standard errors of ranks, one of which ends in the midst."""
    ranks = ranks_forked(count, [*one.args, *one.target()], one.code + code)
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
        if deadline is None and any(rank.poll() is not None for rank in ranks):
            deadline = time.monotonic() + LIMIT
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                rank.send_signal(signal.SIGKILL)
            raise AssertionError(f"still running {LIMIT} s after the first has ended")
    return [rank.returncode for rank in ranks], [rank.communicate()[1] for rank in ranks]


def finished(one, ranks_forked) -> dict[str, bytes]:
    """The output of two ranks that nobody disturbs, which is then removed."""
    codes, errors = run_ranks(ranks_forked, one, "")
    assert codes == [0, 0], errors
    content = one.content()
    assert one.left() == [one.out.name]
    one.clear()
    return content


def lines(errors: list[str]) -> list[str]:
    text = "\n".join(errors)
    assert "Traceback" not in text, text
    assert "gloo" not in text.lower()
    return [line for line in text.splitlines() if line.startswith("sparsecast")]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", MIDST)
def test_a_killed_rank_ends_the_others_with_one_message(stage, ranks_forked, name, which):
    one = stage(name)
    whole = finished(one, ranks_forked)
    code = MIDST[name].replace("WHICH", f"'{which}'").replace("HOW", KILLED)
    codes, errors = run_ranks(ranks_forked, one, code)
    assert codes[which] == -signal.SIGKILL
    assert codes[1 - which] == 1
    (told,) = lines(errors)
    assert f"{name} failed: rank {which} has ended without a word" in told
    assert "the same command goes on from" in told or "repeat the command to resume" in told
    assert not one.out.exists()
    assert finished(one, ranks_forked) == whole


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_rank_ends_those_that_share_batches(stage, ranks_forked, which):
    one = stage("train")
    one.args += ["--data-parallel", "true"]
    code = MIDST["train"].replace("WHICH", f"'{which}'").replace("HOW", KILLED)
    _, errors = run_ranks(ranks_forked, one, code)
    (told,) = lines(errors)
    assert f"train failed: rank {which} has ended without a word" in told
    assert finished(one, ranks_forked)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIDST)
def test_torchruns_rank_that_is_killed_ends_the_other_with_one_message(stage, tmp_path, name):
    """torchrun sends SIGTERM to the others and, 30 s later, SIGKILL."""
    one = stage(name)
    script = tmp_path / "script.py"
    code = MIDST[name].replace("WHICH", "'1'").replace("HOW", KILLED)
    end = "from sparsecast.cli.main import main\nmain()\n"
    script.write_text(f"import os, signal\n{one.code}{code}{end}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *one.args, *one.target()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("sparsecast")]
    assert len(told) == 1, done.stderr
    assert "rank 1 has ended without a word" in told[0]
    assert not one.out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", [KILLED, FAILS], ids=["killed", "fails"])
def test_all_of_three_ranks_end_where_they_meet_at_the_end_alone(stage, ranks_forked, how, which):
    """Ranks that collect are at work for hours before they meet."""
    one = stage("collect")
    code = MIDST["collect"].replace("WHICH", f"'{which}'").replace("HOW", how)
    code += BUSY.replace("WHICH", f"'{which}'")
    codes, errors = run_ranks(ranks_forked, one, code, count=3)
    (told,) = lines(errors)
    if how == KILLED:
        assert f"collect failed: rank {which} has ended without a word" in told
    else:
        assert "collect failed: its own trouble" in told
        assert told.startswith(f"sparsecast rank {which}: " if which else "sparsecast: ")
    assert sorted(codes) == [-signal.SIGKILL if how == KILLED else 1, 1, 1]
    assert not one.out.exists()


@pytest.mark.parametrize(
    "how", [pytest.param(FAILS, marks=pytest.mark.slow), 'raise InputError("its own trouble")']
)
def test_a_rank_that_fails_tells_alone(stage, ranks_forked, how):
    one = stage("sparsify")
    code = "from sparsecast.core.errors import InputError\n"
    code += MIDST["sparsify"].replace("WHICH", "'1'").replace("HOW", how)
    codes, errors = run_ranks(ranks_forked, one, code)
    (told,) = lines(errors)
    assert told.startswith("sparsecast rank 1: ")
    assert "its own trouble" in told
    assert codes == [1, 2 if "InputError" in how else 1]


@pytest.mark.slow
def test_a_rank_that_no_signal_reaches_is_ended(stage, ranks_forked, tmp_path):
    """As in a call of NCCL that waits for the one that is gone."""
    one = stage("collect")
    code = MIDST["collect"].replace("WHICH", "'1'").replace("HOW", KILLED)
    code += DEAF.replace("PLACE", str(tmp_path / "deaf"))
    codes, errors = run_ranks(ranks_forked, one, code)
    (told,) = lines(errors)
    assert told.startswith("sparsecast: rank 1 has ended without a word")
    assert codes == [1, -signal.SIGKILL]
    assert finished(one, ranks_forked)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("which", ["all", 0, 1])
@pytest.mark.parametrize("name", MIDST)
def test_a_signal_ends_all_ranks_with_one_message(stage, ranks_forked, name, which, number):
    one = stage(name)
    code = MIDST[name].replace('os.environ["RANK"] == WHICH', "True")
    if which != "all":
        code = MIDST[name].replace("WHICH", f"'{which}'")
    code = code.replace("HOW", f"os.kill(os.getpid(), {number})")
    codes, errors = run_ranks(ranks_forked, one, code)
    (told,) = lines(errors)
    assert told.startswith("sparsecast: ")
    assert "interrupted" in told or "stopped by SIGTERM" in told
    assert codes[0] in (128 + number, 130 if name == "sparsify" else None), (codes, told)
    assert not one.out.exists()
    assert finished(one, ranks_forked)


BLIND = """
from sparsecast.core import distributed
distributed.SHOWN = 0
if os.environ["RANK"] == "1":
    distributed._sees = lambda folder: False
"""
"""What a rank finds on another disk."""


@pytest.mark.parametrize(
    "name",
    [
        "collect",
        pytest.param("train", marks=pytest.mark.slow),
        pytest.param("sparsify", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_see_the_folder_is_refused(stage, ranks_forked, name):
    one = stage(name)
    codes, errors = run_ranks(ranks_forked, one, BLIND)
    assert codes == [2, 2], errors
    (told,) = lines(errors)
    assert "rank 0 has made this folder, but rank 1 on " in told
    assert "put --out on a disk that all machines share" in told
    assert not one.out.exists()
    if name != "sparsify":  # which keeps the tokenized text
        assert one.left() == []
