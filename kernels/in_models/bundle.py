"""A BUNDLE's weights in a transformers model: the model then computes what the file says.

Every tensor of the file goes into the model's own parameters, the down projections as the others,
q4_0 and q8_0 as the values that they hold; attention's rows go back to where transformers has them.
The activation becomes ReLU (on gate and up in a bamboo), and an OPT's norms lose their epsilon, as
in PowerInfer. Not as in PowerInfer, inputs of the model's own products are not rounded to f16 or
q8_0 and softmax takes no table, so logits differ by that noise; inputs of the predictors' are. A
model in bfloat16 rounds what f16 holds.
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
from sparsecast.export.bundle import SUFFIX, bundle_file
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.checks.tensors import check_tensors
from sparsecast.export.read.header import Header, header_of
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.tensor_map import Row, arranged, model_rows, predictor_names
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.predictor import Predictor


def is_bundle(path: Path) -> bool:
    """Whether a path is a bundle's folder or file; if not, it may be PRED."""
    return path.is_file() or any(path.glob(f"*{SUFFIX}"))


def open_bundle(path: Path) -> tuple[GGUFFile, PredictorSet]:
    """Its file, checked for what a model could not use, and the predictors in it, with the manifest
    that lies beside the file where there is one.

    Raises:
        InputError: Not one bundle, or a damaged one.
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
            f"{folder}: is of {len(manifest.dtypes)} layers, but {file.path} has {header.layers}; "
            "export it again"
        )
    layers = [_predictor(file, layer) for layer in range(header.layers)]
    return file, PredictorSet(layers, header.threshold, manifest)


@torch.no_grad()
def load_weights(file: GGUFFile, model: PreTrainedModel) -> None:
    """Copy every tensor but the predictors into `model`, in place, and set its activation.

    Raises:
        InputError: The file is of another architecture or of other shapes, or holds numbers that
            are not finite; nothing was changed.
    """
    name, header = str(model.config.name_or_path), header_of(file)
    drelu = activation_rule(model.config, name).on_up
    arch = {"falcon": "falcon", "opt": "opt"}.get(model.config.model_type, "llama")
    arch = "bamboo" if drelu else arch
    if arch != header.arch:
        raise InputError(
            f"{file.path}: holds a {header.arch}, but {name} is a {arch}; give a bundle of this "
            "model"
        )
    norms = 2 if "blk.0.attn_norm_2.weight" in file.entries else 1
    tied = bool(model.config.tie_word_embeddings)
    rows = list(model_rows(arch, header.layers, tied=tied, norms=norms))
    targets = {row.target: _parameter(model, row, file) for row in rows}
    for row in rows:
        if not file.tensor(row.target).isfinite().all():
            raise InputError(f"{file.path}: {row.target} is not finite; export it again")
    if tied and arch != "opt":
        _untie(model, file, targets)
    for row in rows:
        stored = file.tensor(row.target)
        targets[row.target].copy_(_as_in_source(stored, row, header))
    if not drelu:
        set_activation(model, ActivationRule("relu"))
        _say_relu(model)
    if arch == "opt":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.0


def _say_relu(model: PreTrainedModel) -> None:
    """In the config too, so that the model is the same after it was saved."""
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
    """The model's parameter that a tensor of the file belongs into."""
    shape = file.entries[row.target].shape
    wanted = shape[::-1] if row.target.endswith("ffn_down_t.weight") else shape
    try:
        parameter = model.get_parameter(row.source)
    except AttributeError:
        parameter = None
    if parameter is None or parameter.shape != wanted:
        found = "has none" if parameter is None else f"has {tuple(parameter.shape)}"
        raise InputError(
            f"{file.path}: {row.target} is {shape}, but {model.config.name_or_path} {found} as "
            f"{row.source}; give a bundle of this model"
        )
    return parameter


def _untie(model: PreTrainedModel, file: GGUFFile, targets: dict[str, Tensor]) -> None:
    """Give the head weights of its own, where the file stores the embedding in two types."""
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
    # Which of the source's rows stands in each row of the file.
    number_N1 = torch.arange(len(stored))[:, None]
    source_N = arranged(number_N1, row.layout, header.heads, header.kv_heads).flatten()
    weight = torch.empty_like(stored)
    weight[source_N] = stored
    return weight
