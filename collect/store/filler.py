"""Fill a shard's buffer from the layers of forward passes.

Masks are packed, counted and stripped of padding on the device that computed them. On a GPU this
work and the copies to the host run on a stream of their own, beside the next layer's computation.
Nothing here waits for that stream, except for energies: only the device knows how many there are.

Shape letters: N positions of a batch, padding included, T kept tokens, D hidden, F FFN width, L
layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.collect.store.energy import Gains, encode
from sparsecast.collect.store.shard import INPUT_DTYPES, Shape, ShardBuffer
from sparsecast.collect.store.units import Unit
from sparsecast.core.bitmask import count_per_neuron, count_per_token, pack
from sparsecast.core.errors import InputError
from sparsecast.core.models.families import family_of
from sparsecast.core.text.tokens import TokenBatch, to_device


class PendingShard:
    """One shard on its way from the device: its buffer, and the events that mark its arrival."""

    def __init__(self, unit: Unit, buffer: ShardBuffer) -> None:
        self.unit = unit
        self.buffer = buffer
        self.row = 0
        self.events: list[torch.cuda.Event] = []

    def active(self, shape: Shape) -> int:
        """Active entries of a complete shard, over all layers."""
        views = (self.buffer.views[f"layer.{layer}.active"] for layer in shape.layers)
        return sum(int(view.sum()) for view in views)

    def wait(self, shape: Shape) -> None:
        """Return when the buffer is complete.

        Raises:
            InputError: An activation is not finite, or an input not in the stored dtype.
        """
        for event in self.events:
            event.synchronize()
        limit = 3e38 if shape.x_dtype == "int8" else torch.finfo(INPUT_DTYPES[shape.x_dtype]).max
        *inputs, x1 = self.buffer.largest.tolist()
        for layer, value in zip(shape.layers, inputs, strict=True):
            _finite(value, layer, "a predictor input")
            if self.unit.stored and value > limit:
                raise InputError(
                    f"layer {layer}: a predictor input of magnitude {value:.3g} does not fit "
                    f"{shape.x_dtype}; collect with --input-dtype bfloat16"
                )
        _finite(x1, shape.layers[-1], "an entry of x1")


def _finite(value: float, layer: int, what: str) -> None:
    if not math.isfinite(value):
        raise InputError(
            f"layer {layer}: {what} is {value}, so the model itself overflows; run it with "
            "--dtype bfloat16 or float32, and check its weights"
        )


class Filler:
    """A recorder's sink that writes into the buffer of the current shard; see `record_unit`.

    Memory: on each device one layer's temporaries and the firing counts of one shard. The counts
    are allocated once: small long-lived buffers between large ones fragment the host heap.
    """

    def __init__(self, shape: Shape, gains: Mapping[int, Gains] | None = None) -> None:
        """
        Args:
            gains: Needed for energies, see `x1_gains`.
        """
        self._shape = shape
        self._dtype = INPUT_DTYPES[shape.x_dtype]
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._gains = {} if gains is None else gains
        self._index = {layer: index for index, layer in enumerate(shape.layers)}
        self._counts: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._home: dict[int, torch.device] = {}
        self._current: PendingShard | None = None
        self._padding: tuple[Tensor, Tensor] | None = None
        self._rows_on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._rows = slice(0)

    @property
    def layers(self) -> list[int]:
        return list(self._shape.layers)

    def begin(self, unit: Unit, buffer: ShardBuffer) -> None:
        """Start the shard of `unit`; every batch of it must follow, in order."""
        buffer.begin(unit.tokens, split=unit.split, number=unit.number, stored=unit.stored)
        buffer.views["id"].copy_(unit.ids())
        buffer.views["position"].copy_(unit.positions())
        self._current = PendingShard(unit, buffer)
        for fired_LF, largest_L in self._counts.values():
            with self._beside(fired_LF):
                fired_LF.zero_()
                largest_L.zero_()

    def batch(self, batch: TokenBatch) -> None:
        """Start a batch, on the CPU; its layers come next."""
        assert self._current is not None
        tokens = batch.tokens
        kept_N = batch.keep_BS.flatten()
        full = tokens == len(kept_N)
        self._padding = None if full else (kept_N.nonzero()[:, 0], (~kept_N).nonzero()[:, 0])
        self._rows_on.clear()
        self._rows = slice(self._current.row, self._current.row + tokens)
        self._current.row += tokens

    def end(self) -> PendingShard:
        """The finished shard, whose last bytes may still be on their way."""
        shard, self._current = self._current, None
        assert shard is not None
        largest = shard.buffer.largest
        for layer, index in self._index.items():
            fired_LF, largest_L = self._counts[self._home[layer]]
            with self._beside(fired_LF):
                view_F = shard.buffer.views[f"layer.{layer}.fired"]
                view_F.copy_(fired_LF[index], non_blocking=True)
                largest[index].copy_(largest_L[index], non_blocking=True)
                if index == len(self._index) - 1:
                    largest[-1].copy_(largest_L[-1], non_blocking=True)
        for stream in self._streams.values():
            shard.events.append(stream.record_event())
        return shard

    def __call__(self, layer: int, x_ND: Tensor, x1_NF: Tensor) -> None:
        with self._beside(x_ND, x1_NF):
            self._layer(layer, x_ND, x1_NF)

    @contextmanager
    def _beside(self, *values: Tensor) -> Iterator[None]:
        """Run on the recording stream of the device of `values`, after their computation."""
        device = values[0].device
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        for value in values:
            value.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def _layer(self, layer: int, x_ND: Tensor, x1_NF: Tensor) -> None:
        shard = self._current
        assert shard is not None
        mask_NF = x1_NF != 0
        fired_LF, largest_L = self._counters(layer, mask_NF.device)
        index = self._index[layer]
        fired_LF[index] += count_per_neuron(mask_NF)
        if self._padding is not None:
            fired_LF[index] -= count_per_neuron(
                mask_NF.index_select(0, self._on(mask_NF.device)[1])
            )
        self._put(f"layer.{layer}.active", self._kept(count_per_token(mask_NF)))
        x_TD = self._kept(x_ND)
        raise_to(largest_L[index], x_TD)
        if index == len(self._index) - 1:
            raise_to(largest_L[-1], self._kept(x1_NF))
        if not shard.unit.stored:
            return
        self._put(f"layer.{layer}.mask", self._kept(pack(mask_NF)))
        self._input(layer, x_TD)
        if self._shape.energy:
            codes_N = encode(self._kept(x1_NF), self._gains[layer], self._kept(mask_NF))
            shard.buffer.energies[layer].append(codes_N.cpu())

    def _counters(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(L, F) int32 firing counts, (L, E, F) in a mixture of experts, and (L + 1,) float32
        `ShardBuffer.largest`, on a device."""
        self._home[layer] = device
        if device not in self._counts:
            layers, width = len(self._index), self._shape.ffn_width
            counts = (self._shape.experts, width) if self._shape.experts else (width,)
            self._counts[device] = (
                torch.zeros(layers, *counts, dtype=torch.int32, device=device),
                torch.zeros(layers + 1, device=device),
            )
        return self._counts[device]

    def _input(self, layer: int, x_TD: Tensor) -> None:
        if self._dtype == torch.int8:
            scale_T = x_TD.float().abs().amax(1) / 127
            self._put(f"layer.{layer}.scale", scale_T)
            x_TD = (x_TD.float() / scale_T.clamp_min(1e-38)[:, None]).round_()
        self._put(f"layer.{layer}.x", x_TD.to(self._dtype) if x_TD.is_cuda else x_TD)

    def _kept(self, value: Tensor) -> Tensor:
        """The rows of `value` that are not padding."""
        return value if self._padding is None else value.index_select(0, self._on(value.device)[0])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of kept rows and of padding rows, copied to a device once per batch."""
        assert self._padding is not None
        if device not in self._rows_on:
            kept_T, padding_N = self._padding
            self._rows_on[device] = to_device(kept_T, device), to_device(padding_N, device)
        return self._rows_on[device]

    def _put(self, name: str, value: Tensor) -> None:
        assert self._current is not None
        self._current.buffer.views[name][self._rows].copy_(value, non_blocking=True)


def raise_to(largest: Tensor, value: Tensor) -> None:
    """Raise `largest` to the largest magnitude in `value`, in place; NaN stays NaN."""
    low, high = value.aminmax()
    torch.maximum(largest, torch.maximum(-low, high).float(), out=largest)


def x1_gains(model: PreTrainedModel, shape: Shape) -> dict[int, Gains]:
    """Return the gains of every recorded layer.

    Empty if `shape` has no energies, which are what needs them.

    Raises:
        InputError: --device-map has moved a down projection off.
    """
    return gains_of(model, shape.layers) if shape.energy else {}


def gains_of(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, Gains]:
    """Return the gains of some layers.

    Raises:
        InputError: --device-map has moved a down projection off.
    """
    family = family_of(model.config, str(model.config.name_or_path))
    blocks = family.decoder_layers(model)
    gains = {}
    for layer in layers:
        down = blocks[layer].get_submodule(family.down)
        assert isinstance(down, nn.Linear)
        if down.weight.is_meta:
            raise InputError(
                "--energy: needs the down projections in memory, but --device-map has moved them "
                "off; use more devices, or leave --energy out"
            )
        gains[layer] = Gains(family.x1_gains(blocks[layer]), family.x1_norm_eps(blocks[layer]))
    return gains
