"""The processes of one torchrun that train together.

The leading process runs the stage. The others own shares of the weights: each waits for a phase,
trains it with the others, and waits again, until the leading one lets it go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from sparsecast.core.distributed import DistributedContext, distributed_context


@dataclass
class Team:
    """The processes, and whether those that follow wait for what is next."""

    context: DistributedContext = field(default_factory=DistributedContext)
    waiting: bool = True
    """False during a phase. A process that fails there just ends: the others lose it, and end."""


def backend() -> str:
    """Return what processes that train together exchange tensors through: NCCL on GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def team() -> Iterator[Team]:
    """Join the processes that torchrun started; let the following ones go at the end."""
    with distributed_context(backend()) as context:
        found = Team(context)
        try:
            yield found
        finally:
            if context.leads and found.waiting:
                context.share(None)
                context.agree_to_end()
