"""Ctrl-C and SIGTERM as a question that long work asks between two batches."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which takes the way of Ctrl-C."""


def interrupt_like(error: BaseException | None, told: str = "") -> KeyboardInterrupt:
    """An interrupt by the signal that `error` is, or came of, with what there is to say of it.

    Args:
        error: An interrupt; or the SystemExit that Lightning makes of one, whose context it is.
        told: Shown to the user.
    """
    came_of = error.__context__ if isinstance(error, SystemExit) else error
    return Terminated(told) if isinstance(came_of, Terminated) else KeyboardInterrupt(told)


class StopFlag:
    """Whether somebody wants the work to end."""

    asked = False
    terminated = False
    """By SIGTERM, which torchrun sends to all ranks when one of them fails."""

    def check(self) -> None:
        """Raise KeyboardInterrupt if so; for SIGTERM, the one that says so."""
        if self.asked:
            raise Terminated if self.terminated else KeyboardInterrupt

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, and no more of them once somebody wants the work to end; `check` after it."""
        for item in items:
            if self.asked:
                return
            yield item


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """The first signal sets the flag; a second one acts as it would have without us."""
    stop = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked, stop.terminated = True, number == signal.SIGTERM
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
