"""Where the sparse paths are no slower than dense ones, as measured; what `auto` goes by.

    MOST_TOKENS[device type][hidden size, FFN width, matrices][path][sparsity] = tokens

means that at this sparsity (true sparsity for `exact`, predicted sparsity for `predicted`) the path
took no longer than the dense FFN for one token and every measured batch up to that many. On a GPU
dense had to take 5 % longer, half of the neurons be silent, and `predicted` be faster than `exact`
where predictors name 1.9 times what is active. Between two measured shapes both must say so; a
shape above all of them counts as the largest, a sparsity between two as the lower. What lies below
all that was measured does not pay, nor does a predictor of a larger rank than was measured. An H100
stands for every CUDA device; of an H200, whose dense FFNs are faster still, one token at 89 % and
two matrices at 4 tokens were measured, and count where they say less.
"""

from __future__ import annotations

import torch

Sparsities = dict[float, int]

MOST_TOKENS: dict[str, dict[tuple[int, int, int], dict[str, Sparsities]]] = {
    # The tokens of a batch selected independently; predictors of rank hidden size / 4.
    # float32, two AMD EPYCs, one thread and two, the slowest of all; predictors in q4_0.
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
    # bfloat16, `sparsecast bench kernels`, 1, 4 and 16 tokens (1 and 4 of two matrices), the worst
    # of the predictors' formats; H100, but 4 tokens of two matrices on an H200.
    "cuda": {
        (512, 2048, 3): {"exact": {0.5: 1, 0.8: 4, 0.98: 16}},
        (1536, 3840, 3): {"exact": {0.5: 1, 0.8: 4, 0.98: 16}},
        (4096, 11008, 3): {"exact": {0.5: 1, 0.8: 4, 0.89: 16}, "predicted": {0.427: 1}},
        (5120, 13824, 3): {"exact": {0.5: 1, 0.8: 4, 0.89: 16}, "predicted": {0.427: 1}},
        (2048, 8192, 2): {"exact": {0.5: 1, 0.89: 4}, "predicted": {0.618: 1}},
        (4096, 16384, 2): {"exact": {0.5: 1, 0.8: 4}, "predicted": {0.618: 1}},
    },
}
MOST_RANK = 0.25
"""Of the hidden size: what the predictors that were measured had."""
CPU_THREADS = 2
"""With more than were measured, a CPU stays dense: its dense products use them better."""


def most_tokens(
    path: str,
    sparsity: float | None,
    *,
    device: str,
    shape: tuple[int, int, int],
    rank: int | None = None,
) -> int:
    """Up to how many tokens a path pays; 0 where the FFN had better stay dense.

    Args:
        path: exact or predicted.
        sparsity: None where it is not known: then the lowest that was measured decides.
        device: A torch device type.
        shape: Hidden size, FFN width, matrices.
        rank: Of the predictor.
    """
    if device == "cpu" and torch.get_num_threads() > CPU_THREADS:
        return 0
    hidden, width, matrices = shape
    if rank is not None and rank > MOST_RANK * hidden:
        return 0
    size = hidden * width
    by_size = {
        key[0] * key[1]: paths.get(path, {})
        for key, paths in MOST_TOKENS.get(device, {}).items()
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
