"""The machine's copy bandwidth, beside which `sparsecast bench engine` puts its rates."""

from __future__ import annotations

import statistics

import torch

from sparsecast.cli.bench.rounds import timed

COPIED = 512 * 2**20
"""Bytes, more than any cache holds."""
COPIES = 5


def copy_gb_per_s(threads: int) -> float:
    """Time torch's copy of 512 MiB within host memory; 10^9 bytes read and written per second.

    The median of 5 copies after one that is not counted, which also touches the pages. Memory:
    1 GiB.

    Args:
        threads: torch's threads during the copies; their number before is put back.
    """
    source, target = (torch.empty(COPIED, dtype=torch.uint8) for _ in range(2))
    source.fill_(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = [timed(lambda: target.copy_(source), source.device) for _ in range(COPIES + 1)]
    finally:
        torch.set_num_threads(before)
    return 2 * COPIED / statistics.median(seconds[1:]) / 1e9
