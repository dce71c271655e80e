"""Compare the bundle's logits, evaluated as the engine does, with the model's.

With every neuron active the two differ only by rounding. Weights are rounded to the types of the
file; values.py compares them exactly, so here the model computes with rounded weights too. The
engine rounds inputs of products to f16, and inputs of products with quantized weights to q8_0. The
latter would hide errors (in a q4_0 file swapped rows of q moved the mean from 1.0 to 1.2 times its
noise), so this check rounds all inputs to f16 and leaves q8_0 to the comparison with the engine.
The effect on the logits depends on the model (depth, scale, saturation), so it is measured on the
same tokens: d0 is the difference that transformers itself shows with and without f16 inputs to
every linear layer. Two realizations of rounding noise of one size differ from float32 by about the
same; the engine adds the f16 table in softmax. The check allows 3 times d0 in the mean and 6 times
at the worst logit. Measured on tiny-prosparse in f16 and in q4_0: a correct bundle has 1.0 in the
mean and 1.0 and 1.5 at the worst; one lost gate row 8 and 10 in the mean; two swapped rows of q in
one layer 22 and 23; a wrong rope base 610 and 620.

Shape letters: N chunks, S chunk length, V vocabulary.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import set_activation
from sparsecast.export.checks.base import Check
from sparsecast.export.checks.sources import factors, module_of, parts, rounded
from sparsecast.export.checks.tensors import expected_shapes
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.read.reader import GGUFFile, TensorType

MEAN_FACTOR, MAX_FACTOR = 3.0, 6.0
FLOOR = 1e-5
"""float32 noise relative to the logits' spread, for a model that rounds nothing."""
LOGIT_CHUNKS = 4
"""Chunks compared logit by logit: 512 tokens."""


def check_logits(emulator: Emulator, model: PreTrainedModel, ids_NS: Tensor) -> Check:
    """Compare logits with every neuron active with `model`, a float32 ReLU model on the CPU."""
    ids_NS = ids_NS[:LOGIT_CHUNKS]
    types = linear_types(emulator.file, factors(model.config.to_dict()))
    ours_NSV = Emulator(emulator.file, coarse=False).logits(ids_NS, all_active=True)
    if reason := degenerate(ours_NSV):
        return Check("logits", False, reason)
    exact_NSV = model_logits(as_stored(model, types), ids_NS)
    d0_NSV = (model_logits(as_stored(model, types, inputs=True), ids_NS) - exact_NSV).abs()
    diff_NSV = (ours_NSV - exact_NSV).abs()
    floor = FLOOR * exact_NSV.std().item()
    mean, mean_bound = diff_NSV.mean().item(), MEAN_FACTOR * d0_NSV.mean().item() + floor
    worst, worst_bound = diff_NSV.max().item(), MAX_FACTOR * d0_NSV.max().item() + floor
    detail = (
        f"everything active against the model with ReLU, {ids_NS.numel()} tokens: mean difference "
        f"{mean:.2e} (bound {mean_bound:.2e}), largest {worst:.2e} (bound {worst_bound:.2e})"
    )
    return Check("logits", mean <= mean_bound and worst <= worst_bound, detail)


def degenerate(logits: Tensor) -> str | None:
    """Say why (..., V) logits cannot be right: NaN, all zero or constant; None if they can."""
    if not bool(logits.isfinite().all()):
        return "the logits hold NaN or infinity"
    if not bool(logits.any()):
        return "all logits are 0"
    if bool((logits.amax(-1) == logits.amin(-1)).any()):
        return "the logits of a position are all equal"
    if bool((logits == logits[..., :1, :]).all()):
        return "the logits are the same at every position"
    return None


@torch.inference_mode()
def model_logits(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    """Compute (N, S, V) float32 logits."""
    output: Any = model(ids_NS, use_cache=False)
    logits_NSV: Tensor = output.logits
    return logits_NSV.float()


def with_relu(model: PreTrainedModel) -> PreTrainedModel:
    """Return a twin with the engine's ReLU and, in an OPT, norms without an epsilon.

    The twin shares the weights. ReLU on gate and up stays.
    """
    twin = _twin(model)
    if not activation_rule(model.config, "model").on_up:
        set_activation(twin, ActivationRule("relu"))
    if model.config.model_type == "opt":
        for module in twin.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.0
    return twin


class Stored(NamedTuple):
    """How the file holds a matrix of the model."""

    type: TensorType
    factor: float
    """The file's values are those of the model times this, see `sources.factors`."""


def linear_types(file: GGUFFile, times: dict[str, float]) -> dict[str, Stored]:
    """Return how the file holds each matrix, by the name of the model's module.

    Args:
        times: Factors by kind of the file's tensor.
    """
    types = {}
    for name in expected_shapes(file):
        source, entry = module_of(file, name), file.entries[name]
        if source is not None and len(entry.shape) == 2:
            types[source] = Stored(entry.type, times.get(parts(name)[1], 1.0))
    # An OPT's file has no output matrix and uses the embedding.
    types.setdefault("lm_head", Stored(file.entries["token_embd.weight"].type, 1.0))
    return types


def as_stored(
    model: PreTrainedModel, types: dict[str, Stored], *, inputs: bool = False
) -> PreTrainedModel:
    """Return a twin that computes with weights rounded as stored; it shares the weights.

    Args:
        inputs: Also round the input of every linear layer to f16.
    """
    twin, down = _twin(model), "." + family_of(model.config, "model").down
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            # The down projection is stored, and split into blocks, transposed.
            hook = partial(_linear, types[name], name.endswith(down), inputs)
            # Before the ReLU that follows up in a bamboo.
            module.register_forward_hook(hook, prepend=True)
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(partial(_rows, types[name]))
    return twin


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    shared: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _linear(
    kind: Stored, flipped: bool, inputs: bool, module: nn.Linear, args: tuple[Tensor], _: Tensor
) -> Tensor:
    weight = _weight(module.weight.T, kind).T if flipped else _weight(module.weight, kind)
    x = args[0].half().float() if inputs else args[0]
    return nn.functional.linear(x, weight, module.bias)


def _rows(kind: Stored, _: nn.Embedding, __: tuple[Tensor], output: Tensor) -> Tensor:
    return _weight(output, kind)


def _weight(weight: Tensor, kind: Stored) -> Tensor:
    """Round as the exporter did: of two equally near codes, the other is a whole step off.

    The twin keeps the model's own scales, so the factor of the file is taken out again.
    """
    if kind.factor == 1.0:
        return rounded(weight.detach(), kind.type).float()
    times = (weight.detach().double() * kind.factor).float()
    return (rounded(times, kind.type).double() / kind.factor).float()
