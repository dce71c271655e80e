"""Time a GPU step as a CUDA graph that runs it on many copies of its weights.

The graph holds one run per copy, so launches from Python are not timed. A replay reads more than
four times the size of the L2 cache, so the cache does not help.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

OVER_L2 = 4.2
REPLAYS = 9


def copies(read_bytes: float, device: torch.device) -> int:
    """How many copies of the weights to rotate over.

    Args:
        read_bytes: Bytes that one run reads of its weights.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(OVER_L2 * l2 / max(read_bytes, 1)))


def microseconds(runs: Sequence[Callable[[], object]]) -> float:
    """The time per run: the median over replays of the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in (*runs[:2], *runs[:1]):  # compile and load
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    repeats = max(1, round(2000 / len(runs) / 20))
    times = []
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(runs) / repeats)
    return float(statistics.median(times[2:]))


def copy_bandwidth(device: torch.device) -> float:
    """GB/s read and written by a device copy: the faster of the driver's and a kernel's."""
    sources = [torch.randn(2**26, device=device) for _ in range(4)]
    target = torch.empty_like(sources[0])
    by_driver = microseconds([partial(target.copy_, s) for s in sources])
    by_kernel = microseconds([partial(torch.neg, s, out=target) for s in sources])
    return 2 * target.nbytes / min(by_driver, by_kernel) / 1e3
