"""Compute the GPU memory that a GPU build of PowerInfer leaves for neurons.

`--vram-budget G` is G GiB, read as a float32. The engine fills it in this order (llama.cpp at
d3ebd7c, `get_offloading_level`, `flush` and `llama_reserve_model_kv_cache`):

    attention weights and norms; predictors; FFN norms; output norm and output matrix
    values, then keys of the KV cache, each left out where it does not fit
    neurons

The embedding and the FFN's own matrices stay in host memory. If one tensor of the first line does
not fit, no neuron goes to the GPU. B is what is left before the last line: the engine loads a split
file whose split.vram_capacity is at most B, and otherwise makes another.

A neuron takes a row of gate (if there is one), of up and of down_t, in the file's own types, and 4
bytes in the list of neurons on the GPU. That list is in GPU memory unless the layer is there as a
whole; the index of all neurons never is. (PowerInfer charges rows of length F instead of D:
floor(B / (4.5 F w)) 4 neurons at w bytes a weight, or 1.125 F weights per neuron where it takes
3 D. That is right for F = 2.67 D; at F = 4 D a third of B stays unused, at F = 2 D a quarter of the
split does not fit. Without a gate it charges 0.5 F weights, which is right for F = 4 D.)

Shape letters: D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

ON_GPU_FIRST = (
    "attn_norm",
    "attn_norm_2",
    "attn_qkv",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "fc1",
    "fc2",
    "ffn_norm",
    "output_norm",
    "output",
)
"""Tensors of the first line above."""
ROWS = ("ffn_gate", "ffn_up", "ffn_down_t")
INDEX_BYTES = 4


@dataclass(frozen=True)
class Budget:
    """GPU memory in bytes, and its uses."""

    given: int
    before: int
    """Attention, norms, predictors and the output matrix."""
    half_cache: int
    """Values of the KV cache; keys take the same."""
    neuron: int
    """One neuron."""

    @property
    def cache(self) -> int:
        """Bytes of the KV cache in GPU memory: none, its values, or all."""
        free = self.given - self.before
        for halves in (2, 1):
            if free >= halves * self.half_cache:
                return halves * self.half_cache
        return 0

    @property
    def room(self) -> int:
        """Bytes left for neurons; negative if the fixed tensors do not fit."""
        return self.given - self.before - self.cache


class Stored(Protocol):
    """A tensor of a file, planned or written."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Sizes(Protocol):
    """What a file's header says of its KV cache."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def budget_for(
    gib: float,
    context: int,
    tensors: Mapping[str, Stored],
    sizes: Sizes,
    *,
    kv_bytes: int = 2,
) -> Budget:
    """Compute the budget of a model file.

    Args:
        gib: PowerInfer's --vram-budget.
        context: PowerInfer's -c, in tokens.
        tensors: All tensors of the file by name.
        sizes: `HParams` before the file is written, `Header` after.
        kv_bytes: Of a number in the KV cache: 2, or 4 with PowerInfer's --memory-f32.
    """
    rows = [tensors[name] for kind in ROWS if (name := f"blk.0.{kind}.weight") in tensors]
    return Budget(
        given=int(float(np.float32(gib)) * 2**30),
        before=sum(t.nbytes for name, t in tensors.items() if tensor_kind(name) in ON_GPU_FIRST),
        half_cache=kv_bytes * sizes.layers * context * sizes.kv_heads * sizes.head_dim,
        # All layers have the same types.
        neuron=sum(t.nbytes // t.shape[0] for t in rows) + INDEX_BYTES,
    )


def gib_for(nbytes: int) -> float:
    """Return the smallest --vram-budget, a float32, that is at least `nbytes`."""
    gib = np.float32(nbytes / 2**30)
    if float(gib) * 2**30 < nbytes:
        gib = np.nextafter(gib, np.float32(np.inf))
    return float(gib)


def tensor_kind(name: str) -> str:
    """Return the part of a name before .weight or .bias: attn_q of blk.3.attn_q.weight."""
    return name.rpartition(".")[0].rpartition(".")[2]
