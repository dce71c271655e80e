"""Number the FFNs of a model: every expert of a mixture has one, every layer of a dense model.

    FFN of expert e in layer i = i * experts + e,    in a dense model i

Predictors, firing counts and recorded rows are looked up by this number.
"""

from __future__ import annotations

from collections.abc import Iterable


def ffn_numbers(layers: Iterable[int], experts: int) -> list[int]:
    """Return the FFNs of `layers`, rising.

    Args:
        experts: Experts per layer; 0 in a dense model.
    """
    each = max(1, experts)
    return [layer * each + expert for layer in layers for expert in range(each)]


def place_of(ffn: int, experts: int) -> tuple[int, int | None]:
    """Return an FFN's layer and expert; None for the expert in a dense model."""
    return divmod(ffn, experts) if experts else (ffn, None)


def ffn_name(ffn: int, experts: int) -> str:
    """Name an FFN in a message."""
    layer, expert = place_of(ffn, experts)
    return f"layer {layer}" if expert is None else f"layer {layer}, expert {expert}"
