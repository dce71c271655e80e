"""Mean, smallest and largest of the numbers of several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means over runs, leaf by leaf; of several runs also `smallest` and `largest`.

    A number that one run lacks is null. Truth values hold if they hold in every run; texts are the
    same in all.
    """
    if len(runs) == 1:
        return dict(runs[0])
    return {
        **_merged(runs, _mean),
        "smallest": _merged(runs, min),
        "largest": _merged(runs, max),
    }


def _mean(values: Sequence[float]) -> float:
    """Equal values stay as they are, integers among them."""
    return values[0] if len(set(values)) == 1 else fmean(values)


def _merged(values: Sequence[Any], merge: Callable[[Sequence[Any]], Any]) -> Any:
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, dict):
        return {name: _merged([value[name] for value in values], merge) for name in first}
    if isinstance(first, list):
        return [_merged(parts, merge) for parts in zip(*values, strict=True)]
    if isinstance(first, bool):
        return all(values)
    return first if isinstance(first, str) else merge(values)
