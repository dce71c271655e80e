"""Label clipping, an option of the public recipe: train on the largest activations only.

If a token has more than `share * F` active neurons, only that many count as active: those with the
largest |x1|, ties included. Predictors then skip more neurons; they miss more active ones, but few
large ones. |x1| comes from the store's energies, divided by `Family.x1_gains`, to within 4.5 % and,
with a norm behind x1, up to a factor that is one for the whole token. A
neuron that adds nothing, whatever its x1 is, never counts.

Shape letters: T tokens, F FFN width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsecast.collect.store.store import ActivationStore, Rows
from sparsecast.core.bitmask import pack
from sparsecast.core.errors import InputError
from sparsecast.core.models.families import family_of


class ClippedStore(ActivationStore):
    """A store with clipped masks and everything else unchanged.

    Raises:
        InputError: The store has no energies.
    """

    def __init__(self, store: ActivationStore, model: PreTrainedModel, share: float) -> None:
        super().__init__(store.folder)
        if not self.manifest.energy:
            raise InputError(
                f"--clip-labels: {store.folder} has no energies to rank activations by; "
                "collect with --energy true"
            )
        self._most = max(1, round(share * self.manifest.ffn_width))
        family = family_of(model.config, str(model.config.name_or_path))
        self._squared_norms = []
        for block in family.decoder_layers(model):
            gain_F = family.x1_gains(block).cpu()
            squared_F = gain_F.square().clamp_min(1e-30)
            self._squared_norms.append(squared_F.where(gain_F > 0, torch.inf))

    def rows(
        self, split: str, shard: int, layer: int, start: int = 0, stop: int | None = None
    ) -> Rows:
        """See `ActivationStore.rows`."""
        rows = super().rows(split, shard, layer, start, stop)
        energy_TF = self.energies(split, shard, layer, start, stop)
        assert energy_TF is not None
        return Rows(rows.x_TD, pack(clipped(energy_TF / self._squared_norms[layer], self._most)))


def clipped(size_TF: Tensor, most: int) -> Tensor:
    """Mask of the `most` largest non-zero entries of each row, ties included."""
    if most >= size_TF.shape[1]:
        return size_TF > 0
    least_T1 = size_TF.topk(most, dim=1).values[:, -1:]
    return (size_TF >= least_T1) & (size_TF > 0)
