"""Cooperative SIGINT and SIGTERM handling: a flag polled between batches."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


def interrupt_like(error: BaseException | None, told: str = "") -> KeyboardInterrupt:
    """Build an interrupt with a message and the signal that `error` or its cause has.

    Args:
        error: An interrupt, or the SystemExit that Lightning raises with the interrupt as context.
        told: Message for the user.
    """
    came_of = error.__context__ if isinstance(error, SystemExit) else error
    return Terminated(told) if isinstance(came_of, Terminated) else KeyboardInterrupt(told)


class StopFlag:
    """A flag that a signal sets to ask for the work to end."""

    asked = False
    terminated = False
    """By SIGTERM, which torchrun sends to all ranks when one of them fails."""

    def check(self) -> None:
        """Raise KeyboardInterrupt if the flag is set, `Terminated` if SIGTERM set it."""
        if self.asked:
            raise Terminated if self.terminated else KeyboardInterrupt

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items` until the flag is set; call `check` afterwards."""
        for item in items:
            if self.asked:
                return
            yield item


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Set the flag at the first signal; a second one takes its default action."""
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
