"""Run an iterator in a thread, a few items ahead of whoever reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """Yield `items` in order; what raises in the thread raises here.

    Closing the iterator ends the thread. Memory: `ahead` items.
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
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()
