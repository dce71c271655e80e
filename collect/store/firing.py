"""Stop if no neuron fires at all, and warn of layers where none or all neurons fire.

If no neuron of any layer was active on any token, recall is 1 and traffic almost 0 by definition,
so every stage stops. If only some layers are silent, their FFN adds nothing and their predictors
rightly predict nothing, so those layers are only named. A layer in which every neuron fires on
every token is named too.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparsecast.collect.store.stats import Stats
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log

ENOUGH = 1_000
"""After this many tokens without any activity, stop: it is no accident."""


class NothingFiresError(InputError):
    """No neuron fires, so the recording is useless."""

    def __init__(self, where: str, tokens: int) -> None:
        super().__init__(
            f"{where}: nothing fires in any layer on {tokens:,} tokens, so there is nothing to "
            "predict; collect with a smaller --activation-threshold, and check the model"
        )


def check_firing(
    stats: Stats, layers: list[int], where: str, splits: Iterable[str] | None = None
) -> None:
    """Stop if no neuron fires on the tokens of `splits`; warn about unusual layers.

    Args:
        where: Source of the counts, for messages.

    Raises:
        NothingFiresError: No layer has an active entry.
    """
    chosen = stats.splits() if splits is None else list(splits)
    silent, busy, tokens = [], [], 0
    for layer in layers:
        fired_F, tokens = stats.fired(layer, chosen), stats.token_sparsity(layer, chosen).tokens
        if not fired_F.any():
            silent.append(layer)
        elif bool((fired_F == tokens).all()):
            busy.append(layer)
    if len(silent) == len(layers):
        raise NothingFiresError(where, tokens)
    among = f"{where}, {tokens:,} tokens"
    if silent:
        _tell(f"{among}: nothing fires in {_named(silent)}; recall is 1 there by definition")
    if busy:
        _tell(
            f"{among}: every neuron fires on every token in {_named(busy)}, so there is no "
            "sparsity to predict; is this a ReLU-sparse model?"
        )


def _named(layers: list[int]) -> str:
    """Name at most 8 layers, and how many more there are."""
    more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:8]))}{more}"


def _tell(text: str) -> None:
    log.warning(text)
