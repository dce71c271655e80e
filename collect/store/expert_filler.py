"""Fill a shard's buffer from the layers of a mixture of experts.

Shape letters: N places of a batch, padding included, T kept tokens, k experts per token, D hidden,
F FFN width.
"""

from __future__ import annotations

from torch import Tensor

from sparsecast.collect.store.filler import Filler, raise_to
from sparsecast.core.bitmask import count_per_neuron, count_per_token, pack


class ExpertFiller(Filler):
    """An `ExpertRecorder`'s sink that writes into the buffer of the current shard.

    Memory: see `Filler`; the firing counts are those of every expert.
    """

    def record(self, layer: int, x_ND: Tensor, chosen_Nk: Tensor, x1_NkF: Tensor) -> None:
        """See `ExpertSink`."""
        with self._beside(x_ND, chosen_Nk, x1_NkF):
            self._experts(layer, self._kept(x_ND), self._kept(chosen_Nk), self._kept(x1_NkF))

    def _experts(self, layer: int, x_TD: Tensor, chosen_Tk: Tensor, x1_TkF: Tensor) -> None:
        assert self._current is not None
        mask_TkF = x1_TkF != 0
        mask_NF = mask_TkF.flatten(0, 1)
        fired_LEF, largest_L = self._counters(layer, mask_NF.device)
        index = self._index[layer]
        for expert in range(self._shape.experts):
            fired_LEF[index, expert] += count_per_neuron(mask_TkF[chosen_Tk == expert])
        self._put(f"layer.{layer}.chosen", chosen_Tk)
        self._put(f"layer.{layer}.active", count_per_token(mask_NF).view(chosen_Tk.shape))
        raise_to(largest_L[index], x_TD)
        if index == len(self._index) - 1:
            raise_to(largest_L[-1], x1_TkF)
        if not self._current.unit.stored:
            return
        self._put(f"layer.{layer}.mask", pack(mask_NF).view(*chosen_Tk.shape, -1))
        self._input(layer, x_TD)
