"""Load a bundle's weights into a transformers model, so that it computes what the file says.

Every tensor of the file is copied into the model's own parameters, q4_0 and q8_0 as float values;
rows of the attention return to transformers' order. As in PowerInfer, the activation becomes ReLU
(on gate and up in Bamboo), OPT's norms have no epsilon, and a Granite's or MiniCPM's scales, which
are part of the file's weights, become those of a llama. Unlike PowerInfer, the model's own
products do not round their inputs to f16 or q8_0, and softmax uses no table, so logits differ by
that noise; predictors round their inputs as PowerInfer does. A model in bfloat16 rounds f16
weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import set_activation
from sparsecast.core.models.scales import scales_of, unscale
from sparsecast.export.bundle import SUFFIX, bundle_file
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.checks.tensors import check_tensors
from sparsecast.export.read.header import Header, header_of
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.tensor_map import Row, arranged, model_rows, predictor_names
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.predictor import Predictor


def is_bundle(path: Path) -> bool:
    """Return whether a path is a bundle's folder or file; if not, it may be a predictor folder."""
    return path.is_file() or any(path.glob(f"*{SUFFIX}"))


def open_bundle(path: Path) -> tuple[GGUFFile, PredictorSet]:
    """Open a bundle: its file, with metadata and tensors checked, and its predictors, with the
    manifest of its predictor folder if there is one.

    Raises:
        InputError: There is no bundle or more than one, or it is damaged.
    """
    file = GGUFFile(bundle_file(path))
    for check in (check_metadata, check_tensors):
        if not (found := check(file)).ok:
            raise InputError(f"{file.path}: {found.detail}; export it again")
    folder = file.path.parent / "predictor"
    manifest = load_predictors(folder).manifest if os.path.lexists(folder) else None
    header = header_of(file)
    if manifest is not None and len(manifest.dtypes) != header.layers:
        raise InputError(
            f"{folder}: has {len(manifest.dtypes)} layers, but {file.path} has {header.layers}; "
            "export it again"
        )
    layers = [_predictor(file, layer) for layer in range(header.layers)]
    return file, PredictorSet(layers, header.threshold, manifest)


@torch.no_grad()
def load_weights(file: GGUFFile, model: PreTrainedModel) -> None:
    """Copy every tensor but the predictors into `model`, in place, and set its activation.

    Raises:
        InputError: The file has another architecture or other shapes, or holds numbers that are not
            finite; or the model has ReLU². The model is unchanged then.
    """
    name, header = str(model.config.name_or_path), header_of(file)
    rule = activation_rule(model.config, name)
    if rule.squared:
        raise InputError(
            f"{file.path}: is for PowerInfer, which has ReLU but not ReLU², and {name} has "
            f"{rule}; give a folder of predictors of this model"
        )
    drelu = rule.on_up
    arch = {"falcon": "falcon", "opt": "opt"}.get(model.config.model_type, "llama")
    arch = "bamboo" if drelu else arch
    if arch != header.arch:
        raise InputError(
            f"{file.path}: is for {header.arch}, but {name} is {arch}; give a bundle of this model"
        )
    norms = 2 if "blk.0.attn_norm_2.weight" in file.entries else 1
    scaled = scales_of(model.config) is not None
    tied = bool(model.config.tie_word_embeddings) and not scaled
    rows = list(model_rows(arch, header.layers, tied=tied, norms=norms))
    targets = {row.target: _parameter(model, row, file) for row in rows}
    for row in rows:
        if not file.tensor(row.target).isfinite().all():
            raise InputError(
                f"{file.path}: {row.target} holds values that are not finite; export it again"
            )
    if scaled:
        unscale(model)
        targets = {row.target: _parameter(model, row, file) for row in rows}
    if tied and arch != "opt":
        _untie(model, file, targets)
    for row in rows:
        stored = file.tensor(row.target)
        targets[row.target].copy_(_as_in_source(stored, row, header))
    if not drelu:
        set_activation(model, ActivationRule("relu"))
        _set_relu_in_config(model)
    if arch == "opt":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.0


def _set_relu_in_config(model: PreTrainedModel) -> None:
    """Set ReLU in the config, so that a saved model is the same."""
    config: Any = model.config
    setattr(config, family_of(config, str(config.name_or_path)).act_key, "relu")
    if hasattr(config, "hidden_act_param"):
        del config.hidden_act_param


def _predictor(file: GGUFFile, layer: int) -> Predictor:
    fc1, fc2 = predictor_names(layer)
    kinds = [file.entries[name].type.name for name in (fc1, fc2)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{file.path}: {fc1} is {kinds[0]} but {fc2} is {kinds[1]}, expected one type; export "
            "it again"
        )
    return Predictor(file.tensor(fc1), file.tensor(fc2), kinds[0])


def _parameter(model: PreTrainedModel, row: Row, file: GGUFFile) -> Tensor:
    """Return the model's parameter for a tensor of the file."""
    shape = file.entries[row.target].shape
    wanted = shape[::-1] if row.target.endswith("ffn_down_t.weight") else shape
    try:
        parameter = model.get_parameter(row.source)
    except AttributeError:
        parameter = None
    if parameter is None or parameter.shape != wanted:
        found = "has none" if parameter is None else f"has {tuple(parameter.shape)}"
        raise InputError(
            f"{file.path}: {row.target} is {shape}, but {model.config.name_or_path} {found} for "
            f"{row.source}; give a bundle of this model"
        )
    return parameter


def _untie(model: PreTrainedModel, file: GGUFFile, targets: dict[str, Tensor]) -> None:
    """Give the head its own weights if the file stores head and embedding in two types."""
    if file.entries["output.weight"].type == file.entries["token_embd.weight"].type:
        return
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    targets["output.weight"] = head.weight


def _as_in_source(stored: Tensor, row: Row, header: Header) -> Tensor:
    if row.target.endswith("ffn_down_t.weight"):
        return stored.T
    if stored.dim() == 1:
        return stored
    # The row of the source that each row of the file holds.
    number_N1 = torch.arange(len(stored))[:, None]
    source_N = arranged(number_N1, row.layout, header.heads, header.kv_heads).flatten()
    weight = torch.empty_like(stored)
    weight[source_N] = stored
    return weight
