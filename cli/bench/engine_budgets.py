"""GPU memory of each row of `sparsecast bench engine`: budgets, splits, layers of dense models.

A budget is PowerInfer's --vram-budget in GiB, or a share of all FFN neurons, which becomes

    what the engine places first + the KV cache + the blocks of 256 neurons next to that share

with the bytes of export/write/vram.py, rounded up to the float32 that the engine reads. The neurons
are the hottest by the bundle's counts, as `sparsecast export --vram-budget` chooses them.

A dense model gets as many layers on the GPU as fit in the same number of bytes. PowerInfer's dense
-ngl (llama.cpp at d3ebd7c, `llm_load_tensors`) takes layers from the last one on, then norm and
matrix of the output together, values, keys of the KV cache. Today's llama.cpp (`load_tensors` in
src/llama-model.cpp) takes the output first, then layers from the last one on, each with its part of
the KV cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.options import short_repr
from sparsecast.export.checks.folders import read_all_counts
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.hot_cold import BLOCK, Split, split_for
from sparsecast.export.write.vram import Budget, budget_for, gib_for, tensor_kind

ON_GPU_TYPES = ("f16", "q4_0")
"""Types of FFN matrices that PowerInfer's CUDA code computes."""


def check_budget(text: str) -> None:
    """Refuse what is neither GiB nor a share of neurons."""
    number = _number(text.removesuffix("%"))
    if number is None or (text.endswith("%") and number > 100):
        raise InputError(
            f"--vram-budget: got {short_repr(text)}, expected GiB such as 3.5, or a share of the "
            "FFN's neurons from 0% to 100%"
        )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and 0 <= number <= 2**20 else None


@dataclass(frozen=True)
class GPUPlan:
    """A budget and what PowerInfer places with it."""

    asked: str
    gib: float
    """PowerInfer's --vram-budget."""
    split: Split

    @property
    def fixed(self) -> bool:
        """Everything before the FFN fits; otherwise no neuron goes to the GPU."""
        return self.split.budget.room >= 0

    @property
    def bytes(self) -> int | None:
        """Planned for weights and KV cache; None if part of the fixed tensors fits."""
        budget = self.split.budget
        if self.fixed:
            return budget.before + budget.cache + self.split.nbytes
        return None if budget.given else 0

    @property
    def neurons(self) -> float:
        """Share of all neurons that are on the GPU."""
        return self.split.neurons / (len(self.split.hot) * self.split.width)

    @property
    def whole(self) -> bool:
        """Whether every layer's FFN is on the GPU as a whole."""
        return all(len(hot_K) == self.split.width for hot_K in self.split.hot)


def counts_of(file: GGUFFile) -> list[Tensor]:
    """Read the bundle's counts, per layer (F,) int64.

    Raises:
        InputError: There are none, they are damaged, or a GPU build cannot split this FFN.
    """
    header = header_of(file)
    if header.ffn % BLOCK:
        raise InputError(
            f"--vram-budget: PowerInfer moves neurons to the GPU in blocks of {BLOCK}, but the FFN "
            f"of {file.path} is {header.ffn} wide; leave the option out and time a CPU build"
        )
    types = {e.type.name for name, e in file.entries.items() if name.startswith("blk.0.ffn_up.w")}
    if not types <= set(ON_GPU_TYPES):
        raise InputError(
            f"--vram-budget: the FFN of {file.path} is {', '.join(types)}, but a GPU build of "
            f"PowerInfer computes {' and '.join(ON_GPU_TYPES)}; export with --dtype f16"
        )
    if (counts := read_all_counts(file)) is None:
        raise InputError(
            f"--vram-budget: {file.path.parent / 'activation'}: no activation counts, which say "
            "what neurons go to the GPU; export the bundle again with --activations"
        )
    return [count_F.round().long() for count_F in counts]


def plan_gpu(asked: str, file: GGUFFile, counts: list[Tensor], context: int) -> GPUPlan:
    """Turn a budget into GiB and a split.

    Args:
        asked: Has passed `check_budget`.
        counts: From `counts_of`.
        context: The -c of the run, in tokens.
    """
    header = header_of(file)

    def budget(gib: float) -> Budget:
        return budget_for(gib, context, file.entries, header)

    if asked.endswith("%"):
        needs = budget(0.0)
        blocks = round(float(asked[:-1]) / 100 * header.layers * header.ffn / BLOCK)
        fixed = needs.before + 2 * needs.half_cache
        gib = gib_for(fixed + blocks * BLOCK * needs.neuron)
    else:
        gib = float(torch.tensor(float(asked), dtype=torch.float32))
    return GPUPlan(asked, gib, split_for(budget(gib), counts))


class DenseLayers(NamedTuple):
    """What of a dense model goes to the GPU."""

    ngl: int
    on_gpu: frozenset[str]
    """Names of its tensors, as the PowerInfer file has them."""


NO_LAYERS = DenseLayers(0, frozenset())


def powerinfer_layers(file: GGUFFile, given: int, context: int) -> DenseLayers:
    """Return the -ngl of PowerInfer's dense graph that fits in `given` bytes."""
    header = header_of(file)
    half_cache = 2 * header.layers * context * header.kv_heads * header.head_dim
    steps = [_layer(file, i) for i in reversed(range(header.layers))]
    steps += [_output(file), ((), half_cache), ((), half_cache)]
    return _fitting(steps, given)


def llama_cpp_layers(file: GGUFFile, given: int, context: int) -> DenseLayers:
    """Return the -ngl of today's llama.cpp that fits in `given` bytes."""
    header = header_of(file)
    cache = 2 * 2 * context * header.kv_heads * header.head_dim
    layers = [_layer(file, i) for i in reversed(range(header.layers))]
    return _fitting([_output(file), *((names, n + cache) for names, n in layers)], given)


def _layer(file: GGUFFile, i: int) -> tuple[tuple[str, ...], int]:
    names = tuple(
        name
        for name in file.entries
        if name.startswith(f"blk.{i}.") and tensor_kind(name) not in ("fc1", "fc2")
    )
    return names, sum(file.entries[name].nbytes for name in names)


def _output(file: GGUFFile) -> tuple[tuple[str, ...], int]:
    names = tuple(n for n in file.entries if tensor_kind(n) in ("output", "output_norm"))
    return names, sum(file.entries[name].nbytes for name in names)


def _fitting(steps: list[tuple[tuple[str, ...], int]], given: int) -> DenseLayers:
    """Take steps while their bytes fit."""
    ngl, on_gpu = 0, set[str]()
    for names, nbytes in steps:
        if nbytes > given:
            break
        given -= nbytes
        ngl += 1
        on_gpu |= set(names)
    return DenseLayers(ngl, frozenset(on_gpu))
