"""Record units of tokens into shards, and write those in the background.

Memory: `BUFFERS` shard buffers, allocated as they are first needed; a caller that asks for one more
waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from sparsecast.collect.store.filler import Filler, PendingShard
from sparsecast.collect.store.firing import ENOUGH, NothingFiresError
from sparsecast.collect.store.shard import Shape, ShardBuffer
from sparsecast.collect.store.units import Unit
from sparsecast.core.text.tokens import TokenBatch

BUFFERS = 3
THREADS = 2


def record_unit(
    filler: Filler, writer: Writer, unit: Unit, forward: Callable[[TokenBatch], object]
) -> None:
    """Fill one shard and hand it to the writer.

    Args:
        forward: Runs the model on a batch, on the CPU; every layer of it must reach `filler`.

    Raises what went wrong with an earlier shard, see `Writer.buffer`.
    """
    filler.begin(unit, writer.buffer())
    for batch in unit.batches:
        filler.batch(batch)
        forward(batch)
    writer.submit(filler.end())


class Writer:
    """Waits for the bytes of filled shards, then checks, hashes and writes them in threads.

    A context manager that ends when all shards are written.
    """

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
            write: Stores a finished buffer under a name; called from threads.
            pinned: Page-lock the buffers, for copies from a GPU.
        """
        self._shape = shape
        self._capacity = capacity
        self._pinned = pinned
        self._write = write
        self._allocated = 0
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
        """Wait until all submitted shards are written. Raises what went wrong."""
        pending, self._pending = self._pending, []
        for future in pending:
            self._done(future)

    def buffer(self) -> ShardBuffer:
        """Return a free buffer.

        Raises the error of an earlier shard, or `NothingFiresError` if nothing has fired so far.
        """
        while self._pending and self._pending[0].done():
            self._done(self._pending.pop(0))
        if not self._active and self._tokens >= ENOUGH:
            raise NothingFiresError("the model", self._tokens)
        if self._free.empty() and self._allocated < BUFFERS:
            self._allocated += 1
            return ShardBuffer(self._shape, self._capacity, pinned=self._pinned)
        return self._free.get()

    def submit(self, shard: PendingShard) -> None:
        """Write `shard` when its bytes have arrived, then reuse its buffer."""
        self._pending.append(self._pool.submit(self._finish, shard))

    def _done(self, future: Future[tuple[int, int]]) -> None:
        tokens, active = future.result()
        self._tokens += tokens
        self._active += active

    def _finish(self, shard: PendingShard) -> tuple[int, int]:
        """(tokens, active entries) of the shard written."""
        try:
            shard.wait(self._shape)
            self._write(shard.unit.info.name, shard.buffer)
            return shard.unit.tokens, shard.active(self._shape)
        finally:
            shard.buffer.energies = {}
            self._free.put(shard.buffer)


def to_memory(name: str, buffer: ShardBuffer) -> int:
    """Finish a shard, drop it, and return its size: for timing recording without a disk."""
    return sum(len(block) for block in buffer.blocks())


def to_folder(folder: Path) -> Callable[[str, ShardBuffer], None]:
    """Write shards into a folder, each whole or not at all, even after a power cut."""

    def write(name: str, buffer: ShardBuffer) -> None:
        part = folder / f"{name}.part"
        try:
            with part.open("wb", buffering=0) as file:
                for block in buffer.blocks():
                    while block:
                        block = block[file.write(block) :]
                os.fsync(file.fileno())
            part.replace(folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(folder / name)) from error

    return write
