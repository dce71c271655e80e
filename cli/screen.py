"""Log records on the screen: yellow warnings, red errors, tables drawn as wide as the terminal."""

from __future__ import annotations

import logging

from sparsecast.core import progress
from sparsecast.core.errors import one_line
from sparsecast.core.messages import Rendered, log

STYLES = {logging.WARNING: "yellow", logging.ERROR: "red"}


class ScreenHandler(logging.Handler):
    """Print messages beside running bars, on the console that draws those.

    A message's style is that of its level, or the one that it brings along as
    `extra={"style": ...}`. Characters that a terminal would obey, as in a name, are escaped.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, Rendered):
            progress.console.print(record.msg.renderable)
            return
        style = getattr(record, "style", STYLES.get(record.levelno))
        text = "\n".join(map(one_line, record.getMessage().split("\n")))
        progress.console.print(text, style=style, soft_wrap=True)


def print_messages() -> None:
    """Print every message of the package from now on; a second call changes nothing."""
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, ScreenHandler) for handler in log.handlers):
        log.addHandler(ScreenHandler())
