"""Stop if no neuron fires at all, and warn of layers where none or all neurons fire.

If no neuron of any layer was active on any token, recall is 1 and traffic almost 0 by definition,
so every stage stops. If only some layers are silent, their FFN adds nothing and their predictors
rightly predict nothing, so those layers are only named. A layer in which every neuron fires on
every token is named too. In a mixture the same holds for each expert, and experts that no token was
routed to are named.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparsecast.collect.store.stats import Stats
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log
from sparsecast.core.models.ffns import ffn_name

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
    stats: Stats, ffns: list[int], where: str, splits: Iterable[str] | None = None
) -> None:
    """Stop if no neuron fires on the tokens of `splits`; warn about unusual layers.

    Args:
        ffns: Numbers of the FFNs, see core/models/ffns.py; the layers of a dense model.
        where: Source of the counts, for messages.

    Raises:
        NothingFiresError: No layer has an active entry.
    """
    chosen = stats.splits() if splits is None else list(splits)
    silent, busy, idle, most = [], [], [], 0
    for ffn in ffns:
        fired_F, tokens = stats.fired(ffn, chosen), stats.token_sparsity(ffn, chosen).tokens
        most = max(most, tokens)
        if not tokens:
            idle.append(ffn)
        elif not fired_F.any():
            silent.append(ffn)
        elif bool((fired_F == tokens).all()):
            busy.append(ffn)
    if len(silent) + len(idle) == len(ffns):
        raise NothingFiresError(where, most)
    among = where if stats.experts else f"{where}, {most:,} tokens"
    if idle:
        _tell(f"{among}: no token is routed to {_named(idle, stats.experts)}")
    if silent:
        names = _named(silent, stats.experts)
        _tell(f"{among}: nothing fires in {names}; recall is 1 there by definition")
    if busy:
        _tell(
            f"{among}: every neuron fires on every token in {_named(busy, stats.experts)}, so "
            "there is no sparsity to predict; is this a ReLU-sparse model?"
        )


def _named(ffns: list[int], experts: int) -> str:
    """Name at most 8 layers, or experts, and how many more there are."""
    more = f" and {len(ffns) - 8} more" if len(ffns) > 8 else ""
    if experts:
        return "; ".join(ffn_name(ffn, experts) for ffn in ffns[:8]) + more
    return f"layer{'s' * (len(ffns) > 1)} {', '.join(map(str, ffns[:8]))}{more}"


def _tell(text: str) -> None:
    log.warning(text)
