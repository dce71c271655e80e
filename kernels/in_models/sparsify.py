"""`sparsify_model`: put `SparseFFN` into a transformers model, in place.

    exact       no prediction; up and down where the gate fired
    predicted   the rows that the predictors name, and the model's own activation on them
    auto        layer by layer: predicted where the calibration says that little is lost and it was
                measured to pay (measured.py), else exact; and dense, as the model was, where
                neither pays; more tokens at once than predicting pays for are exact

Prompts are dense but for what `predicted` leaves out. Every path but the predicted one gives the
model's own output up to rounding. From a BUNDLE the model first gets all of the file's weights, and
ReLU, so that it computes what PowerInfer would (bundle.py).

Shape letters: D hidden, F FFN width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule, FATReLU
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import Family, activation_rule, family_of
from sparsecast.core.models.shape import model_shape
from sparsecast.kernels.in_models.bundle import is_bundle, load_weights, open_bundle
from sparsecast.kernels.in_models.dispatch import most_tokens
from sparsecast.kernels.in_models.sparse_ffn import SparseFFN, runs_kernels
from sparsecast.kernels.ops.ffn import FFN, PredictorWeights
from sparsecast.kernels.ops.quantized import Quantized, quantized
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_model, check_usage
from sparsecast.predictors.predictor import Predictor

POLICIES = ("exact", "predicted", "auto")


def sparsify_model(
    model: PreTrainedModel,
    source: str | Path | PredictorSet | None = None,
    policy: str = "auto",
    *,
    least_recall: float = 0.9,
    least_energy_recall: float = 0.95,
) -> PreTrainedModel:
    """Replace the FFNs of `model`, which is returned.

    The weights are the model's own parameters. The down projection is transposed once, layer by
    layer, and the one that was there is let go. `state_dict` and `save_pretrained` still give the
    checkpoint's names and shapes; the way back is to load the model again. Compile afterwards.

    Args:
        model: On its device and in its dtype. In float16 or bfloat16 on CUDA it runs the kernels,
            else plain torch, see `module`.
        source: PRED, predictors that were loaded already, or a BUNDLE, its folder or its file. None
            where nothing shall be predicted.
        policy: See above.
        least_recall: `auto` predicts a layer whose calibration in PRED's manifest reaches this
            recall; without a manifest it is exact.
        least_energy_recall: The same for energy recall, where the manifest has one.

    Raises:
        InputError: Another policy; predictors of another model (known by its fingerprint where the
            model has a folder, else by its shapes); an unsupported family, activation or FFN;
            weights that are not in memory; or see `load_predictors`, `open_bundle`, `load_weights`.
    """
    name = str(model.config.name_or_path) or "the model"
    if policy not in POLICIES:
        raise InputError(f"policy: got {policy!r}, expected one of {', '.join(POLICIES)}")
    if source is None and policy == "predicted":
        raise InputError("policy: predicted needs predictors; give PRED or a BUNDLE, or use exact")
    family = family_of(model.config, name)
    layers = family.decoder_layers(model)
    for number, layer in enumerate(layers):
        _check(layer, family, f"{name}: layer {number}")
        _rule(layer, family, model, name)
    file, predictors = None, source if isinstance(source, PredictorSet) else None
    if isinstance(source, (str, Path)) and is_bundle(Path(source)):
        file, predictors = open_bundle(Path(source))
    elif isinstance(source, (str, Path)):
        predictors = load_predictors(source)
    if predictors is not None:
        where = "the predictors" if isinstance(source, PredictorSet) else str(source)
        _check_model(predictors, where, model, name)
        if file is None:  # a bundle computes what it says itself
            rule = _rule(layers[0], family, model, name)
            check_usage(predictors, where, rule, family.convention, name)
    if file is not None:
        load_weights(file, model)
    bounds = (least_recall, least_energy_recall)
    for number, layer in enumerate(layers):
        up: Any = layer.get_submodule(family.up)
        plan = _plan(policy, predictors, number, up.weight, family.matrices, bounds)
        if plan.most_tokens == 0:
            continue
        predictor = None
        if plan.predicted:
            assert predictors is not None
            predictor = _on_device(predictors, number, up.weight.device)
        sparse = SparseFFN(
            _ffn(layer, family, _rule(layer, family, model, name)),
            predictor,
            most_tokens=plan.most_tokens,
            exact_tokens=plan.exact_tokens,
            masks_prompts=policy == "predicted",
        )
        _swap(layer, family, sparse)
    return model


class Plan(NamedTuple):
    """What becomes of one layer."""

    predicted: bool
    most_tokens: int | None
    """None for all that the device is made for, 0 for a layer that stays as it is."""
    exact_tokens: int = 0
    """Of a predicted layer: see `SparseFFN`."""


def _plan(
    policy: str,
    predictors: PredictorSet | None,
    layer: int,
    up_FD: Tensor,
    matrices: int,
    bounds: tuple[float, float],
) -> Plan:
    if policy != "auto":
        return Plan(policy == "predicted", None)
    manifest = None if predictors is None else predictors.manifest
    scores: dict[str, float] = {} if manifest is None else manifest.calibration[layer]
    least_recall, least_energy_recall = bounds
    energy_recall = scores.get("energy_recall")
    predicted = scores.get("recall", 0.0) >= least_recall and (
        energy_recall is None or energy_recall >= least_energy_recall
    )
    device = "cuda" if runs_kernels(up_FD) else "cpu"
    if device == "cpu" and (up_FD.is_cuda or up_FD.dtype != torch.float32):
        return Plan(False, 0)
    shape = (up_FD.shape[1], up_FD.shape[0], matrices)
    exact = most_tokens("exact", scores.get("true_sparsity"), device=device, shape=shape)
    if predicted:
        assert predictors is not None
        rank = predictors.layers[layer].rank
        sparsity = scores.get("predicted_sparsity")
        tokens = most_tokens("predicted", sparsity, device=device, shape=shape, rank=rank)
        if tokens:
            return Plan(True, tokens, exact)
    return Plan(False, exact)


def _check(layer: nn.Module, family: Family, where: str) -> None:
    if any(isinstance(module, SparseFFN) for module in layer.modules()):
        raise InputError(f"{where} is sparse already; load the model again")
    for path in filter(None, (family.gate, family.up, family.down)):
        linear = layer.get_submodule(path)
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            kind = type(linear).__name__
            raise InputError(
                f"{where} has {path} as a {kind} that holds no plain weights, expected "
                "nn.Linear in a float dtype; load the model without quantization or adapters"
            )
        if linear.weight.is_meta:
            raise InputError(
                f"{where} has no weights in memory for {path} (offloaded or on the meta device); "
                "load the model onto one device"
            )
        if family.gate is not None and linear.bias is not None:
            raise InputError(
                f"{where} has a bias in {path}, which PowerInfer's gated FFNs have not; use the "
                "model as it is"
            )


def _rule(layer: nn.Module, family: Family, model: PreTrainedModel, name: str) -> ActivationRule:
    """What the layer computes now: a threshold in the module goes before the config's."""
    act = layer.get_submodule(family.act)
    if isinstance(act, FATReLU) and act.threshold is not None:
        return ActivationRule("fatrelu", act.threshold)
    rule = activation_rule(model.config, name)
    return ActivationRule("relu") if rule.name == "fatrelu" and isinstance(act, nn.ReLU) else rule


def _check_model(predictors: PredictorSet, where: str, model: PreTrainedModel, name: str) -> None:
    manifest = predictors.manifest
    if (Path(name) / "config.json").is_file():
        fingerprint = Checkpoint(name).fingerprint
    else:
        fingerprint = "" if manifest is None else manifest.fingerprint
    check_model(predictors, where, model_shape(model), fingerprint=fingerprint, model=name)


def _ffn(layer: nn.Module, family: Family, rule: ActivationRule) -> FFN:
    gate: Any = None if family.gate is None else layer.get_submodule(family.gate)
    up: Any = layer.get_submodule(family.up)
    down: Any = layer.get_submodule(family.down)
    down_FD = nn.Parameter(down.weight.detach().T.contiguous(), down.weight.requires_grad)
    return FFN(
        None if gate is None else gate.weight,
        up.weight,
        down_FD,
        up.bias,
        down.bias,
        rule.name,
        rule.threshold,
    )


def _on_device(predictors: PredictorSet, layer: int, device: torch.device) -> PredictorWeights:
    predictor: Predictor = predictors.layers[layer].to(device)

    def stored(weight: Tensor) -> Tensor | Quantized:
        return weight.half() if predictor.dtype == "f16" else quantized(weight, predictor.dtype)

    fc1_RD, fc2_FR = (stored(weight) for weight in predictor.weights)
    return PredictorWeights(fc1_RD, fc2_FR, predictors.threshold)


def _swap(layer: nn.Module, family: Family, sparse: SparseFFN) -> None:
    if sparse.predicts:
        family.norm(layer).register_forward_pre_hook(sparse.see)
    place = family.down.rpartition(".")[0]
    if not place:  # an OPT, whose layer holds the parts itself
        place = family.up
        for name in (family.act, family.down):
            setattr(layer, name, nn.Identity())
    setattr(layer, place, sparse)
    names = {
        "up_FD": f"{family.up}.weight",
        "down_FD": f"{family.down}.weight",
        "up_bias_F": f"{family.up}.bias",
        "down_bias_D": f"{family.down}.bias",
        **({} if family.gate is None else {"gate_FD": f"{family.gate}.weight"}),
    }
    sparse.register_state_dict_post_hook(partial(_renamed, place, names))


def _renamed(
    place: str, names: dict[str, str], _: nn.Module, state: dict[str, Any], prefix: str, __: Any
) -> None:
    """Give a state dict the checkpoint's names, and the down projection as `nn.Linear` has it."""
    for ours, name in names.items():
        if (weight := state.pop(prefix + ours, None)) is not None:
            theirs = prefix.removesuffix(f"{place}.") + name
            state[theirs] = weight.T if ours == "down_FD" else weight
