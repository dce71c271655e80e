"""The processes of one torchrun: who they are, and where they wait for each other.

Every rank walks the same plan and does its share of the units, so nothing but barriers passes
between them, on gloo, whatever the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed


@dataclass(frozen=True)
class Team:
    """This process among `size`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def team() -> Iterator[Team]:
    """The ranks that torchrun has set up, or this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    # A rank may have a day more to do than another, or wait for its model's download.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Team(distributed.get_rank(), size, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        distributed.destroy_process_group()
