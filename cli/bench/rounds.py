"""Timing shared by the benchmarks: several things in turn, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from sparsecast.core.progress import progress_bar

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; return at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], *devices: torch.device) -> float:
    """Seconds that `run` takes, including its work on the devices."""
    for device in devices:
        synchronize(device)
    start = time.perf_counter()
    run()
    for device in devices:
        synchronize(device)
    return time.perf_counter() - start


def in_rounds(
    measures: Mapping[str, Callable[[], T]], rounds: int, *, alternate: bool = False
) -> dict[str, list[T]]:
    """Take each measurement once per round; returns the values of all rounds by name.

    Args:
        alternate: Reverse the order in every other round.
    """
    values: dict[str, list[T]] = {name: [] for name in measures}
    with progress_bar("bench", rounds * len(measures)) as progress:
        for number in range(rounds):
            names = list(measures)
            for name in names[::-1] if alternate and number % 2 else names:
                values[name].append(measures[name]())
                progress.advance()
    return values


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median over rounds, by name; names without a value are left out."""
    return {name: statistics.median(found) for name, found in values.items() if found}


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
