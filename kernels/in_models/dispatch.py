"""Measurements of where the sparse paths are no slower than dense; `auto` goes by them.

    MEASURED[device type][hidden size, FFN width, matrices][path][sparsity] = tokens

means that at this sparsity (true sparsity for `exact`, predicted sparsity for `predicted`) the path
took no longer than the dense FFN for one token and for every measured batch up to `tokens`. An
entry for a GPU requires three more things: dense took at least 5 % longer, at least half of the
neurons were silent, and `predicted`, with predictors that select 1.9 times the active neurons, was
faster than `exact`.

A shape between two measured ones needs both to agree; a shape above all of them counts as the
largest, and a sparsity between two measured ones as the lower. A smaller shape or a lower sparsity
than any measured stays dense, as does a predictor of a higher rank.

`auto` applies H100 measurements to every CUDA device. On an H200, whose dense FFNs are faster, one
token at a sparsity of 0.89 and 4 tokens with two matrices were measured; an entry is the lower of
the two GPUs' results.
"""

from __future__ import annotations

import torch

Sparsities = dict[float, int]

MEASURED: dict[str, dict[tuple[int, int, int], dict[str, Sparsities]]] = {
    # Tokens of a batch select independently; predictors have rank hidden size / 4.
    # float32, the slowest result of two AMD EPYCs with 1 and 2 threads; predictors in q4_0.
    "cpu": {
        (1024, 2816, 3): {"exact": {0.8: 1, 0.9: 4}, "predicted": {0.7: 1, 0.8: 2, 0.9: 4}},
        (1536, 3840, 3): {
            "exact": {0.7: 1, 0.8: 2, 0.9: 4},
            "predicted": {0.7: 2, 0.8: 4, 0.9: 8},
        },
        (2048, 5632, 3): {
            "exact": {0.7: 1, 0.8: 2, 0.9: 8},
            "predicted": {0.6: 1, 0.7: 2, 0.8: 4, 0.9: 8},
        },
        (4096, 11008, 3): {"exact": {0.7: 1, 0.8: 4}, "predicted": {0.6: 1, 0.7: 4, 0.8: 8}},
    },
    # bfloat16, `sparsecast bench kernels`, 1, 4 and 16 tokens (1 and 4 with two matrices), the
    # slowest predictor format; H100, but 4 tokens with two matrices on an H200.
    "cuda": {
        (512, 2048, 3): {"exact": {0.5: 1, 0.8: 4, 0.98: 16}},
        (1536, 3840, 3): {"exact": {0.5: 1, 0.8: 4, 0.98: 16}},
        (4096, 11008, 3): {"exact": {0.5: 1, 0.8: 4, 0.89: 16}, "predicted": {0.427: 1}},
        (5120, 13824, 3): {"exact": {0.5: 1, 0.8: 4, 0.89: 16}, "predicted": {0.427: 1}},
        (2048, 8192, 2): {"exact": {0.5: 1, 0.89: 4}, "predicted": {0.618: 1}},
        (4096, 16384, 2): {"exact": {0.5: 1, 0.8: 4}, "predicted": {0.618: 1}},
    },
}
MAX_RANK = 0.25
"""Largest rank measured, as a share of the hidden size."""
MAX_CPU_THREADS = 2
"""With more threads a CPU stays dense: dense products use them better."""


def max_tokens(
    path: str,
    sparsity: float | None,
    *,
    device: str,
    shape: tuple[int, int, int],
    rank: int | None = None,
) -> int:
    """Return the largest number of tokens for which a path pays; 0 if the FFN should stay dense.

    Args:
        path: exact or predicted.
        sparsity: None if it is unknown; then the lowest measured sparsity decides.
        device: A torch device type.
        shape: Hidden size, FFN width, matrices.
        rank: The predictor's rank.
    """
    if device == "cpu" and torch.get_num_threads() > MAX_CPU_THREADS:
        return 0
    hidden, width, matrices = shape
    if rank is not None and rank > MAX_RANK * hidden:
        return 0
    size = hidden * width
    by_size = {
        key[0] * key[1]: paths.get(path, {})
        for key, paths in MEASURED.get(device, {}).items()
        if key[2] == matrices
    }
    below, above = ([s for s in by_size if s <= size], [s for s in by_size if s >= size])
    if not below:
        return 0
    nearest = [max(below), min(above, default=max(below))]
    return min(_at(by_size[measured], sparsity) for measured in nearest)


def _at(by_sparsity: Sparsities, sparsity: float | None) -> int:
    lower = [s for s in by_sparsity if sparsity is None or s <= sparsity]
    return by_sparsity[(min if sparsity is None else max)(lower)] if lower else 0
