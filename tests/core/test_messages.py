"""Messages go through `logging`: to nobody unasked, and to the screen from the command line."""

from __future__ import annotations

import logging
import subprocess
import sys

from rich.table import Table

from sparsecast.cli.screen import ScreenHandler
from sparsecast.core.messages import log, show

LIBRARY = """
import logging, sys
from rich.table import Table
from sparsecast.core.messages import log, show
if sys.argv[1:]:
    logging.basicConfig(level="INFO", format="%(name)s %(message)s")
table = Table("layer", "recall")
table.add_row("0", "[0.95]")
log.info("told")
show(table)
log.warning("of concern, 100 %s")
"""


def run(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, *args], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr


def test_a_library_tells_warnings_alone():
    assert run() == "of concern, 100 %s\n"


def test_a_caller_who_configures_logging_gets_text_and_tables():
    text = run("configured")

    assert text.startswith("sparsecast told\nsparsecast ")
    assert "layer" in text
    assert "[0.95]" in text
    assert text.endswith("sparsecast of concern, 100 %s\n")


def test_the_command_line_prints_once_and_draws_tables(capsys):
    table = Table("layer")
    table.add_row("[7]")

    log.info("told of [brackets]")
    show(table)

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("told of [brackets]\n")
    assert printed.err.count("[7]") == 1


def test_a_style_is_the_levels_or_the_messages_own(monkeypatch):
    styles = []
    monkeypatch.setattr(
        "sparsecast.core.progress.console.print", lambda _, **kw: styles.append(kw["style"])
    )
    handler = ScreenHandler()
    for level, extra in ((logging.INFO, {}), (logging.WARNING, {}), (logging.INFO, {"style": "b"})):
        handler.emit(logging.makeLogRecord({"levelno": level, "msg": "m", **extra}))
    assert styles == [None, "yellow", "b"]
