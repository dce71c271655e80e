"""`sparsify_model`: put `SparseFFN` into a transformers model, in place.

    exact       no prediction; up and down where the gate fired
    predicted   the rows that the predictors select, with the model's own activation
    auto        per layer: predicted if its calibration shows little loss and dispatch.py expects it
                to be faster, else exact or dense, whichever is expected to be faster; more tokens
                than predicting pays for go the exact way

Prompts are dense; with `predicted`, the neurons that a predictor leaves out are zero in them too.
Every path but the predicted one gives the model's own output up to rounding. From a bundle the
model first gets all weights of the file, and ReLU: it then computes what PowerInfer would
(bundle.py).

Shape letters: D hidden, F FFN width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ReLUSquaredActivation

from sparsecast.core.errors import InputError
from sparsecast.core.hub import local_folder
from sparsecast.core.models.activations import ActivationRule, FATReLU
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import Family, activation_rule, family_of, refuse_experts
from sparsecast.core.models.shape import model_shape
from sparsecast.export.read.reader import GGUFFile
from sparsecast.kernels.in_models.bundle import is_bundle, load_weights, open_bundle
from sparsecast.kernels.in_models.dispatch import max_tokens
from sparsecast.kernels.in_models.sparse_ffn import SparseFFN, runs_kernels
from sparsecast.kernels.ops.ffn import FFN, PredictorWeights
from sparsecast.kernels.ops.quantized import Quantized, quantized
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_model, check_usage
from sparsecast.predictors.predictor import Predictor

DENSE_ALONE = (
    "the kernels skip neurons of dense FFNs alone; collect, train, report and evaluate work"
)
POLICIES = ("exact", "predicted", "auto")


def sparsify_model(
    model: PreTrainedModel,
    source: str | Path | PredictorSet | None = None,
    policy: str = "auto",
    *,
    least_recall: float = 0.9,
    least_energy_recall: float = 0.95,
) -> PreTrainedModel:
    """Replace the FFNs of `model` and return it.

    The weights are the model's own parameters. The down projection is transposed once, layer by
    layer, and the old one is freed. `state_dict` and `save_pretrained` still give the checkpoint's
    names and shapes. To undo this, load the model again. Call `torch.compile` afterwards.

    Args:
        model: On its device and in its dtype. In float16 or bfloat16 on CUDA it runs the kernels,
            else plain torch, see `SparseFFN`.
        source: A predictor folder, loaded predictors, a bundle (its folder or file), or the hub id
            of predictors or a bundle. None for no prediction.
        policy: exact, predicted or auto, see above.
        least_recall: `auto` predicts a layer whose calibration reaches this recall. A layer without
            a calibration in the manifest is not predicted.
        least_energy_recall: The same for energy recall, if the manifest has one.

    Raises:
        InputError: An unknown policy; predictors of another model (compared by fingerprint if the
            model has a folder, else by shape); an unsupported family, activation or FFN; weights
            that are not in memory; or see `load_predictors`, `open_bundle`, `load_weights`.
    """
    name = str(model.config.name_or_path) or "the model"
    if policy not in POLICIES:
        raise InputError(f"policy: got {policy!r}, expected one of {', '.join(POLICIES)}")
    if source is None and policy == "predicted":
        raise InputError(
            "policy: predicted needs predictors; give a predictor folder or a bundle, or use exact"
        )
    family = family_of(model.config, name)
    refuse_experts(model.config, name, DENSE_ALONE)
    layers = family.decoder_layers(model)
    for number, layer in enumerate(layers):
        _check_layer(layer, family, f"{name}: layer {number}")
        _current_rule(layer, family, model, name)
    file, predictors = _open(source)
    if predictors is not None:
        where = "the predictors" if isinstance(source, PredictorSet) else str(source)
        _check_model(predictors, where, model, name)
        if file is None:  # a bundle sets the activation
            rule = _current_rule(layers[0], family, model, name)
            check_usage(predictors, where, rule, family.convention, name)
    if file is not None:
        load_weights(file, model)
    min_recalls = (least_recall, least_energy_recall)
    for number, layer in enumerate(layers):
        up: Any = layer.get_submodule(family.up)
        plan = _plan(policy, predictors, number, up.weight, family.matrices, min_recalls)
        if plan.max_tokens != 0:
            rule = _current_rule(layer, family, model, name)
            _replace(layer, family, _sparse_ffn(layer, number, family, rule, predictors, plan))
    return model


def _open(
    source: str | Path | PredictorSet | None,
) -> tuple[GGUFFile | None, PredictorSet | None]:
    """Open a source; the file is None unless it is a bundle."""
    if source is None or isinstance(source, PredictorSet):
        return None, source
    folder = local_folder(source, "predictors", "bundle")
    return open_bundle(folder) if is_bundle(folder) else (None, load_predictors(folder))


class Plan(NamedTuple):
    """What one layer becomes."""

    predicted: bool
    max_tokens: int | None
    """None for the device's limit, 0 for a layer that stays as it is."""
    max_exact_tokens: int = 0
    """For a predicted layer, see `SparseFFN`."""
    mask_prompts: bool = False


def _plan(
    policy: str,
    predictors: PredictorSet | None,
    layer: int,
    up_FD: Tensor,
    matrices: int,
    min_recalls: tuple[float, float],
) -> Plan:
    if policy != "auto":
        return Plan(policy == "predicted", None, mask_prompts=policy == "predicted")
    manifest = None if predictors is None else predictors.manifest
    scores: dict[str, float] = {} if manifest is None else manifest.calibration[layer]
    min_recall, min_energy_recall = min_recalls
    energy_recall = scores.get("energy_recall")
    predicted = scores.get("recall", 0.0) >= min_recall and (
        energy_recall is None or energy_recall >= min_energy_recall
    )
    device = "cuda" if runs_kernels(up_FD) else "cpu"
    if device == "cpu" and (up_FD.is_cuda or up_FD.dtype != torch.float32):
        return Plan(False, 0)
    shape = (up_FD.shape[1], up_FD.shape[0], matrices)
    exact = max_tokens("exact", scores.get("true_sparsity"), device=device, shape=shape)
    if predicted:
        assert predictors is not None
        rank = predictors.layers[layer].rank
        sparsity = scores.get("predicted_sparsity")
        tokens = max_tokens("predicted", sparsity, device=device, shape=shape, rank=rank)
        if tokens:
            return Plan(True, tokens, exact)
    return Plan(False, exact)


def _check_layer(layer: nn.Module, family: Family, where: str) -> None:
    if any(isinstance(module, SparseFFN) for module in layer.modules()):
        raise InputError(f"{where} is already sparse; load the model again")
    for path in filter(None, (family.gate, family.up, family.down)):
        linear = layer.get_submodule(path)
        if not _is_plain(linear):
            kind = type(linear).__name__
            raise InputError(
                f"{where} has {path} as a {kind} without plain weights, expected nn.Linear in a "
                "float dtype; load the model without quantization or adapters"
            )
        if linear.weight.is_meta:
            raise InputError(
                f"{where} has no weights in memory for {path} (offloaded or on the meta device); "
                "load the model onto one device"
            )
        if family.gate is not None and linear.bias is not None:
            raise InputError(
                f"{where} has a bias in {path}, expected none in a gated FFN (as in PowerInfer); "
                "use the model as it is"
            )


def _is_plain(linear: nn.Module) -> bool:
    """Return whether a layer computes x @ weight.T + bias from float weights. BitNet's subclass of
    `nn.Linear` does not, since it rounds both factors. Falcon's, in transformers before 5.24, does.
    """
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        return False
    own = type(linear).forward is not nn.Linear.forward
    return not own or type(linear).__name__ == "FalconLinear"


def _current_rule(
    layer: nn.Module, family: Family, model: PreTrainedModel, name: str
) -> ActivationRule:
    """Return the layer's activation; what is in the module overrides the config."""
    act = layer.get_submodule(family.act)
    if isinstance(act, FATReLU) and act.threshold is not None:
        return ActivationRule("fatrelu", act.threshold)
    if isinstance(act, ReLUSquaredActivation):
        return ActivationRule("relu2")
    rule = activation_rule(model.config, name)
    plain = rule.name != "drelu" and isinstance(act, nn.ReLU)
    return ActivationRule("relu") if plain else rule


def _check_model(predictors: PredictorSet, where: str, model: PreTrainedModel, name: str) -> None:
    manifest = predictors.manifest
    if (Path(name) / "config.json").is_file():
        fingerprint = Checkpoint(name).fingerprint
    else:
        fingerprint = "" if manifest is None else manifest.fingerprint
    check_model(predictors, where, model_shape(model), fingerprint=fingerprint, model=name)


def _sparse_ffn(
    layer: nn.Module,
    number: int,
    family: Family,
    rule: ActivationRule,
    predictors: PredictorSet | None,
    plan: Plan,
) -> SparseFFN:
    """Build a layer's FFN; the transposed copy of the down projection is made here."""
    gate: Any = None if family.gate is None else layer.get_submodule(family.gate)
    up: Any = layer.get_submodule(family.up)
    down: Any = layer.get_submodule(family.down)
    x1_norm: Any = None if family.x1_norm is None else layer.get_submodule(family.x1_norm)
    predictor = None
    if plan.predicted:
        assert predictors is not None
        predictor = _predictor_weights(predictors, number, up.weight.device)
    down_FD = nn.Parameter(down.weight.detach().T.contiguous(), down.weight.requires_grad)
    ffn = FFN(
        None if gate is None else gate.weight,
        up.weight,
        down_FD,
        up.bias,
        down.bias,
        None if x1_norm is None else x1_norm.weight,
        act=rule.name,
        threshold=rule.threshold,
        x1_norm_eps=0.0 if x1_norm is None else x1_norm.variance_epsilon,
    )
    return SparseFFN(
        ffn,
        predictor,
        max_tokens=plan.max_tokens,
        max_exact_tokens=plan.max_exact_tokens,
        mask_prompts=plan.mask_prompts,
    )


def _predictor_weights(
    predictors: PredictorSet, layer: int, device: torch.device
) -> PredictorWeights:
    predictor: Predictor = predictors.layers[layer].to(device)

    def stored(weight: Tensor) -> Tensor | Quantized:
        return weight.half() if predictor.dtype == "f16" else quantized(weight, predictor.dtype)

    fc1_RD, fc2_FR = (stored(weight) for weight in predictor.weights)
    return PredictorWeights(fc1_RD, fc2_FR, predictors.threshold)


def _replace(layer: nn.Module, family: Family, sparse: SparseFFN) -> None:
    """Put `sparse` where the layer's FFN is."""
    if sparse.predicts:
        family.norm(layer).register_forward_pre_hook(sparse.keep_predictor_input)
    place = family.down.rpartition(".")[0]
    if not place:  # in OPT the layer holds the parts itself
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
        **({} if family.x1_norm is None else {"x1_norm_F": f"{family.x1_norm}.weight"}),
    }
    sparse.register_state_dict_post_hook(partial(_rename_state, place, names))


def _rename_state(
    place: str, names: dict[str, str], _: nn.Module, state: dict[str, Any], prefix: str, __: Any
) -> None:
    """Give a state dict the checkpoint's names and the down projection's shape in `nn.Linear`."""
    for ours, name in names.items():
        if (weight := state.pop(prefix + ours, None)) is not None:
            theirs = prefix.removesuffix(f"{place}.") + name
            state[theirs] = weight.T if ours == "down_FD" else weight
