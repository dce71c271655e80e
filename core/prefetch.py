"""Run an iterator in a thread, a few items ahead of its consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(
    items: Iterable[T], ahead: int = 2, waiting: Callable[[], None] = lambda: None
) -> Iterator[T]:
    """Yield `items` in order; an exception in the thread is raised here.

    Closing the iterator ends the thread after its current item. A thread blocked on an item that
    never comes, from a pipe that nobody fills, lives until the process ends. Memory: `ahead` items.

    Args:
        waiting: Called while no item is ready; may raise.
    """
    queue: Queue[tuple[str, Any]] = Queue(ahead)
    closed = Event()

    def put(kind: str, value: Any) -> bool:
        while not closed.is_set():
            try:
                queue.put((kind, value), timeout=0.1)
                return True
            except Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                # A wait without end would not see Ctrl-C.
                kind, value = queue.get(timeout=0.5)
            except Empty:
                waiting()
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join(timeout=1)
