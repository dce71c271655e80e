"""What is said where nobody can hear it: one line or none, a code, and never a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from sparsecast.cli.terminal import print_output

SPARSECAST = f"{sys.executable} -m sparsecast"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_module_is_the_program():
    done = shell(f"{SPARSECAST} --help")
    assert done.returncode == 0
    assert "sparsecast STAGE" in done.stdout


@pytest.mark.parametrize("args", ["--help", "--version", "bench --help", "train --help"])
@pytest.mark.parametrize(
    ("to", "code", "said"),
    [
        (
            ">/dev/full",
            1,
            "sparsecast: standard output cannot be written (No space left on device)\n",
        ),
        (">&-", 1, "sparsecast: standard output cannot be written (it is closed)\n"),
        ("2>&-", 0, ""),
    ],
    ids=["full", "closed", "no stderr"],
)
def test_help_that_cannot_be_written(args, to, code, said):
    done = shell(f"{SPARSECAST} {args} {to}")
    assert (done.returncode, done.stderr) == (code, said)


def test_a_reader_that_goes_away_is_no_error():
    done = shell(f"{SPARSECAST} train --help | (exec 0<&-; sleep 1; true)")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("to", ["2>/dev/full", "2>&-"])
def test_an_error_that_nobody_hears_keeps_its_code(to):
    assert shell(f"{SPARSECAST} tarin {to}").returncode == 2


def test_a_rank_that_is_no_number_is_named_by_every_stage():
    done = shell(f"{SPARSECAST} inspect .", RANK="x")
    assert done.returncode == 2
    assert "RANK='x' in the environment: expected a whole number" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["x", "", "-1", "9" * 4400, "1.5"])
def test_a_rank_that_is_no_number_hides_no_error(value):
    done = shell(f"{SPARSECAST} tarin", RANK=value)
    assert done.returncode == 2
    assert done.stderr.endswith("no stage is called 'tarin'; did you mean train?\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("encoding", "want"), [("ascii", b"/tmp/\\xe9\\udcff\n"), ("utf-8", b"/tmp/\xc3\xa9\\udcff\n")]
)
def test_what_an_encoding_lacks_is_escaped(encoding, want, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding, newline=""))
    print_output("/tmp/\xe9\udcff\n")
    assert raw.getvalue() == want
