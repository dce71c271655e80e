"""The processes of one torchrun: ranks, barriers, and errors that end all of them.

In most stages every rank follows the same plan and does its share of the units, so ranks exchange
only barriers and errors, through gloo on every device.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sparsecast.core.errors import InputError
from sparsecast.core.messages import log
from sparsecast.core.options import short_repr
from sparsecast.core.progress import console
from sparsecast.core.rank_watch import RankWatch

if TYPE_CHECKING:  # builds of torch may lack it
    from torch.distributed.distributed_c10d import Store

JOIN = timedelta(minutes=5)
"""Within which every rank must have started."""
FOREVER = timedelta(days=7)
"""A rank may have a day more to do than another, or wait for its model's download."""
SHOWN = 10
"""Seconds within which a new folder on a shared disk is seen by all machines."""
_LOST = re.compile("Connection closed by peer|Connection reset by peer|Broken pipe")
"""What gloo says of a process that has ended."""
_watch: RankWatch | None = None


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank among `size` processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return this process's device; `auto` and `cuda` give each local rank a GPU of its own."""
        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            with _quiet_loss():
                distributed.barrier()

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank; other ranks wait for it. It is pickled."""
        if self.size > 1:
            said = [value]
            with _quiet_loss():
                distributed.broadcast_object_list(said, src=0)
            value = said[0]
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank; every rank calls this."""
        if self.size > 1:
            flags = torch.tensor([int(flag)])
            with _quiet_loss():
                distributed.all_reduce(flags, distributed.ReduceOp.MAX)
            flag = bool(flags[0])
        return flag

    def agree_to_end(self) -> None:
        """Say that every rank is about to end, and that one of them tells why."""
        if _watch is not None:
            _watch.agree()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank; continue only if it succeeded on all of them.

        An `InputError` of any rank is raised again on rank 0; the other ranks exit silently.
        """
        said: list[Any] = [None]
        try:
            yield
        except InputError as error:
            if self.size == 1:
                raise
            said = [str(error)]
        if self.size > 1:
            mine, said = said[0], [None] * self.size
            with _quiet_loss():
                distributed.all_gather_object(said, mine)
            if message := next((text for text in said if text is not None), None):
                self.agree_to_end()
                raise InputError(message) if self.leads else SystemExit(2)


def check_shared(folder: Path, context: DistributedContext) -> None:
    """Check that every rank sees the folder that rank 0 has made; every rank calls this.

    Raises:
        InputError: One does not within `SHOWN` seconds; see `DistributedContext.together`.
    """
    if context.size == 1:
        return
    limit = time.monotonic() + SHOWN
    with context.together():
        while not _sees(folder):
            if time.monotonic() > limit:
                raise InputError(
                    f"{folder}: rank 0 has made this folder, but rank {context.rank} on "
                    f"{platform.node()} does not see it; put --out on a disk that all machines "
                    "share, and give the same path on each"
                )
            time.sleep(0.2)


def _sees(folder: Path) -> bool:
    """Return whether a folder is there.

    A listing asks the server of a shared disk, where a look at the folder itself may not.
    """
    try:
        return folder.name in os.listdir(folder.parent)
    except PermissionError:  # a parent that may be entered, but not listed
        return folder.is_dir()
    except OSError:
        return False


@contextmanager
def _quiet_loss() -> Iterator[None]:
    """End a rank that has lost its connection; `RankWatch.explain` finds out why."""
    try:
        yield
    except RuntimeError as error:
        raise SystemExit(1) from error


@contextmanager
def distributed_context(backend: str = "gloo") -> Iterator[DistributedContext]:
    """Join the ranks that torchrun started, or run alone; contexts may be nested.

    Args:
        backend: What torch.distributed exchanges tensors through. Objects, flags and barriers need
            gloo for the CPU.
    """
    size = int_from_environment("WORLD_SIZE", 1, least=1)
    if size == 1:
        yield DistributedContext()
        return
    if distributed.is_initialized():
        yield _this()
        return
    _check_launched(size)
    global _watch
    store = _join(size)
    rank, local_rank = int(os.environ["RANK"]), int_from_environment("LOCAL_RANK", 0)
    _watch = watch = RankWatch(store, rank, size, local_rank)
    try:
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=FOREVER
        )
        console.quiet = log.disabled = rank > 0
        yield _this()
    except BaseException as error:
        outcome = watch.explain(error, _is_loss(error))
        if outcome is error:
            raise
        raise outcome from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        watch.close()
        _watch = None


def _is_loss(error: BaseException) -> bool:
    """Whether an error may come of the end of another rank."""
    if isinstance(error, SystemExit):
        return isinstance(error.__cause__, RuntimeError)
    lost = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    return lost or isinstance(error, distributed.DistError)


def _join(size: int) -> Store:
    """Wait until every rank has started.

    Raises:
        ConnectionError: Some have not within `JOIN`; SystemExit where another rank tells that.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    rank = int(os.environ["RANK"])
    minutes = f"within {JOIN.seconds // 60} minutes: start them all at once, or see why one ended"
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own
            found, _, _ = next(rendezvous("env://", timeout=JOIN))
        else:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            found = TCPStore(*place, size, rank == 0, JOIN, wait_for_workers=False)
    except RuntimeError as error:
        told = f"no rank 0 has started at {os.environ['MASTER_ADDR']} {minutes}"
        raise ConnectionError(told) if rank == 1 else SystemExit(1) from error
    store: Store = PrefixStore("sparsecast", found)
    joined, limit = store.add("joined", 1), time.monotonic() + JOIN.total_seconds()
    while joined < size:  # in Python, where signals end it
        if time.monotonic() > limit:
            told = f"{joined} of {size} ranks have started {minutes}"
            raise SystemExit(1) if rank else ConnectionError(told)
        time.sleep(0.05)
        joined = store.add("joined", 0)
    store.set_timeout(FOREVER)
    return store


def int_from_environment(name: str, unset: int, *, least: int = 0, most: int = 2**31 - 1) -> int:
    """Read a number that torchrun sets in the environment of its processes.

    Raises:
        InputError: The variable holds something else.
    """
    text = os.environ.get(name, str(unset))
    if not (text.isascii() and text.isdecimal() and len(text) <= 10):
        raise _refused(name, text, "a whole number")
    if not least <= int(text) <= most:
        raise _refused(name, text, f"a number from {least:,} to {most:,}")
    return int(text)


def _refused(name: str, text: str, expected: str) -> InputError:
    return InputError(
        f"{name}={short_repr(text)} in the environment: expected {expected}; torchrun sets it for "
        f"several processes, `unset {name}` for one"
    )


def _check_launched(size: int) -> None:
    """Check torchrun's environment variables before waiting for other ranks."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(
                f"WORLD_SIZE={size} in the environment, but no {name}: torchrun sets both for "
                "several processes, `unset WORLD_SIZE` for one"
            )
    int_from_environment("RANK", 0, most=size - 1)
    int_from_environment("MASTER_PORT", 0, most=2**16 - 1)
    int_from_environment("LOCAL_RANK", 0)
    int_from_environment("LOCAL_WORLD_SIZE", size, least=1, most=size)


def _this() -> DistributedContext:
    local_rank = int_from_environment("LOCAL_RANK", 0)
    return DistributedContext(distributed.get_rank(), distributed.get_world_size(), local_rank)
