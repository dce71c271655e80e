"""Finish shards in the background: wait for their bytes, check, hash and write them.

Memory: `BUFFERS` images, allocated as they are first needed; whoever asks for one more waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from sparsecast.collect.store.filler import PendingShard
from sparsecast.collect.store.firing import ENOUGH, Silent
from sparsecast.collect.store.shard import Shape, ShardBuffer

BUFFERS = 3
THREADS = 2


class Writer:
    """Takes filled shards; use as a context, which ends when all of them are written."""

    def __init__(
        self,
        shape: Shape,
        capacity: int,
        write: Callable[[str, ShardBuffer], object],
        *,
        pinned: bool = False,
    ) -> None:
        """
        Args:
            capacity: Bytes of the largest shard.
            write: Puts a finished image away under a name; called from threads.
            pinned: Whether images are page-locked, as copies from a GPU want them.
        """
        self._shape = shape
        self._capacity = capacity
        self._pinned = pinned
        self._write = write
        self._made = 0
        self._free: SimpleQueue[ShardBuffer] = SimpleQueue()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="shard")
        self._pending: list[Future[tuple[int, int]]] = []
        self._tokens = self._active = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.drain()

    def drain(self) -> None:
        """Return when all that was submitted is written. Raises what went wrong."""
        pending, self._pending = self._pending, []
        for future in pending:
            self._done(future)

    def image(self) -> ShardBuffer:
        """An image to fill.

        Raises what went wrong with an earlier one, and `Silent` where nothing has fired so far.
        """
        while self._pending and self._pending[0].done():
            self._done(self._pending.pop(0))
        if not self._active and self._tokens >= ENOUGH:
            raise Silent("the model", self._tokens)
        if self._free.empty() and self._made < BUFFERS:
            self._made += 1
            return ShardBuffer(self._shape, self._capacity, pinned=self._pinned)
        return self._free.get()

    def submit(self, filling: PendingShard) -> None:
        """Write `filling` when its bytes have arrived, then reuse its image."""
        self._pending.append(self._pool.submit(self._finish, filling))

    def _done(self, future: Future[tuple[int, int]]) -> None:
        tokens, active = future.result()
        self._tokens += tokens
        self._active += active

    def _finish(self, filling: PendingShard) -> tuple[int, int]:
        """(tokens, active entries) of what was written."""
        try:
            filling.wait(self._shape)
            self._write(filling.unit.name, filling.image)
            return filling.unit.tokens, filling.active(self._shape)
        finally:
            filling.image.energies = {}
            self._free.put(filling.image)


def to_memory(name: str, image: ShardBuffer) -> int:
    """Finish a shard and forget it but for its size in bytes: what recording costs where no disk is
    in the way."""
    return sum(len(block) for block in image.blocks())


def to_folder(folder: Path) -> Callable[[str, ShardBuffer], None]:
    """Write shards into a folder, each whole or not at all, through power cuts too."""

    def write(name: str, image: ShardBuffer) -> None:
        part = folder / f"{name}.part"
        try:
            with part.open("wb", buffering=0) as file:
                for block in image.blocks():
                    while block:
                        block = block[file.write(block) :]
                os.fsync(file.fileno())
            part.replace(folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(folder / name)) from error

    return write
