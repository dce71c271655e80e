"""Raise one FATReLU threshold during training until x1 is as sparse as asked.

Every FFN computes fatrelu_T with the same T, which follows the gates:

    T = quantile of all gates of all layers at the wanted share of zeros s(t)
    s(t) = S - (S - s_0) (1 - q)^3,  q rising from 0 to 1 between RAMP's shares of the training

s_0 is the share of zeros at the start of the ramp and S is the target. So the target is met
whatever the scale of the activations, without a weight to tune. The loss gets one more term, which
moves what T has cut below zero and leaves the large activations alone:

    BELOW_WEIGHT * sum over layers of mean over tokens and neurons of relu(g) [g < T] / T

Under it T itself falls again, often to where plain ReLU is as sparse as asked.

The ramp is that of gradual magnitude pruning (arXiv 1710.01878, equation 1). FATReLU is that of
ProSparse (arXiv 2402.13516), whose T is chosen after training; docs/experiments.md compares both.

Shape letters: B sequences, S tokens of each, F FFN width, K sampled gates.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

RAMP = (0.1, 0.6)
"""Shares of the training between which sparsity rises."""
BELOW_WEIGHT = 0.03
UPDATE_STEPS = 5
"""Steps between two moves of the threshold."""
SMOOTHING = 0.7
"""Part of the old threshold in the new one."""
CORRECTION = 0.1
"""How fast the quantile makes up for a share of zeros in x1 that is not the gate's."""
SAMPLED_NEURONS = 128
"""Of each layer; the quantile is computed from their gates at two tokens of every sequence."""


class RaisedThreshold(nn.Module):
    """The state of the threshold. All of it stays on the device, so that no step waits for it."""

    threshold: Tensor
    want: Tensor
    """The share of zeros that is wanted now."""
    ramp: Tensor
    """q: how much of the ramp is done."""
    affordable: Tensor
    """1 if the ramp may go on, 0 if it waits."""
    begun_at: Tensor
    """s_0."""
    correction: Tensor
    """Added to the share whose quantile is taken: zeros in x1 can have other causes than T."""

    def __init__(self, target: float, steps: int) -> None:
        """Start without a threshold.

        Args:
            target: S.
            steps: Optimizer steps of the training.
        """
        super().__init__()
        self.target = target
        self.first = max(1, round(RAMP[0] * steps))
        self._rise = UPDATE_STEPS / max(UPDATE_STEPS, round((RAMP[1] - RAMP[0]) * steps))
        for name in ("threshold", "want", "ramp", "begun_at", "correction"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("affordable", torch.ones(()))
        self.record: tuple[Tensor, Tensor] | None = None
        """Of the FFN that has run last the mean relu(g) [g < T] / T, and some gates."""
        self.length = 1
        """Tokens of a sequence of the forward pass that is under way."""

    @property
    def goal(self) -> Tensor:
        """(2,) threshold and wanted share of zeros."""
        return torch.stack([self.threshold, self.want])

    def take_record(self) -> tuple[Tensor, Tensor] | None:
        """Return the record and forget it."""
        record, self.record = self.record, None
        return record

    @torch.no_grad()
    def move(self, step: int, gates_K: Tensor, zeros: Tensor) -> None:
        """Move the threshold behind the backward pass of a step.

        Args:
            step: The first one is 0.
            gates_K: Gates of all layers of this rank, float32.
            zeros: () share of zeros in x1, the mean over layers, of this step on all ranks.
        """
        if step % UPDATE_STEPS or step < self.first:
            return
        started = self.ramp > 0
        self.begun_at.copy_(torch.where(started, self.begun_at, zeros))
        cuts = started & (self.threshold > 0)
        self.correction += torch.where(cuts, CORRECTION * (self.want - zeros), 0.0)
        self.ramp.add_(self._rise * self.affordable).clamp_(max=1)
        self.want.copy_(self.target - (self.target - self.begun_at) * (1 - self.ramp) ** 3)
        found = _quantile(gates_K, (self.want + self.correction).clamp(0, 1))
        smoothed = SMOOTHING * self.threshold + (1 - SMOOTHING) * found
        # At 0 the term ends, and with it the push to more sparsity than is wanted.
        goes_on = (self.threshold > 0) & (found > 0)
        self.threshold.copy_(torch.where(goes_on, smoothed, found))


def _quantile(gates_K: Tensor, share: Tensor) -> Tensor:
    """Return the gate that `share` of the gates of all ranks lie below, or 0 if it is negative."""
    if distributed.is_initialized() and (ranks := distributed.get_world_size()) > 1:
        everywhere = gates_K.new_empty(ranks * len(gates_K))
        distributed.all_gather_into_tensor(everywhere, gates_K)
        gates_K = everywhere
    place = (share * (len(gates_K) - 1)).long()
    # Not [place], for which a GPU would be waited for.
    return gates_K.sort().values.gather(0, place.view(1)).squeeze(0).clamp(min=0)


class RaisedFATReLU(nn.Module):
    """FATReLU with the threshold of a `RaisedThreshold`, which it tells about the gates."""

    def __init__(self, shared: RaisedThreshold) -> None:
        super().__init__()
        self._shared = (shared,)  # no submodule: the model's state stays that of its checkpoint

    def forward(self, gate: Tensor) -> Tensor:
        (shared,) = self._shared
        threshold = shared.threshold.to(gate.dtype)
        fires = gate >= threshold
        cut = torch.where(fires, 0, gate.relu()).float().mean()
        below = cut / threshold.float().clamp(min=1e-12)
        shared.record = below, _sample(gate.detach(), shared.length)
        return torch.where(fires, gate, 0)


def _sample(gate: Tensor, length: int) -> Tensor:
    """Return some gates of every sequence, however sequences are spread over passes; float32."""
    gate_BSF = gate.reshape(-1, length, gate.shape[-1])
    stride = max(1, gate.shape[-1] // SAMPLED_NEURONS)
    # Not [[a, b]], which would copy the list to a GPU and wait for it in every FFN.
    at = [gate_BSF[:, place, ::stride] for place in (length // 3, 2 * length // 3)]
    return torch.stack(at, dim=1).float().flatten()
