"""PRED: a folder of predictors, the way PowerInfer's converter and ours read it.

model_<i>.pt    {"fc1.weight": (R, D), "fc2.weight": (F, R)}, one per layer, no gaps: f16, or the
                dequantised values of q8_0 and q4_0 in f32
config.json     {"sparse_threshold": t}: active where logit >= t
manifest.json   what PowerInfer does not ask: the model's fingerprint, where the input is
                taken, the activation, formats, calibration scores, the recipe
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch

from sparsecast.collect.activations import ActivationRule
from sparsecast.collect.atomic import new_folder, read_json, write_json
from sparsecast.collect.disk import save_tensors
from sparsecast.collect.errors import InputError
from sparsecast.collect.folders import refuse_other
from sparsecast.predictors.blocks import BLOCK
from sparsecast.predictors.formats import BITS, rounded
from sparsecast.predictors.mlp import Predictor

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class PredictorManifest:
    """What a predictor folder says about itself."""

    model: str
    fingerprint: str
    """Of the model the predictors belong to, see `Checkpoint.fingerprint`."""
    convention: str
    """Where the input is taken, see `collect.families`."""
    activation: str
    activation_threshold: float
    hidden_size: int
    ffn_width: int
    ffn_matrices: int
    dtypes: list[str]
    """Per layer: f16, q8_0 or q4_0."""
    ranks: list[int]
    calibration: list[dict[str, float]]
    """Per layer: recall and predicted_sparsity on the calibration split."""
    recipe: dict[str, Any]
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class PredictorSet:
    """All layers' predictors and their one threshold."""

    layers: list[Predictor]
    threshold: float
    manifest: PredictorManifest | None
    """None for a folder that another tool wrote."""

    def save(self, folder: Path) -> None:
        """Write the folder in one step; an earlier predictor folder there is replaced."""
        with new_folder(folder, replaces="model_0.pt") as part:
            self.write_into(part)

    def write_into(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        for i, predictor in enumerate(self.layers):
            stored = predictor.stored()
            weights = {"fc1.weight": stored.fc1_RD, "fc2.weight": stored.fc2_FR}
            # Own, contiguous storage: a view would drag its whole base into the file.
            save_tensors(
                folder / f"model_{i}.pt",
                {
                    name: w.detach().cpu().clone(memory_format=torch.contiguous_format)
                    for name, w in weights.items()
                },
            )
        write_json(folder / "config.json", {"sparse_threshold": self.threshold})
        if self.manifest is not None:
            write_json(folder / "manifest.json", asdict(self.manifest))


def load_predictors(folder: str | Path) -> PredictorSet:
    """Read a predictor folder, ours or one that PowerInfer published.

    Memory: none for files as `PredictorSet` writes them, which stay memory maps; other dtypes are
    converted.

    Raises:
        InputError: No predictors there, a gap in the layers, or a file that does not hold two
            finite matrices that fit together.
    """
    folder = Path(folder)
    found = {
        int(m[1]) for p in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)", p.stem))
    }
    if not found:
        refuse_other(folder, "predictors")
        raise InputError(
            f"{folder}: no model_0.pt in it, expected a folder written by `sparsecast train` or "
            "one of PowerInfer's predictor repositories"
        )
    if missing := sorted(set(range(max(found) + 1)) - found):
        raise InputError(f"{folder}: model_{missing[0]}.pt is missing; train again or copy it here")
    threshold = 0.0
    if (folder / "config.json").is_file():
        value = read_json(folder / "config.json", "sparse_threshold").get("sparse_threshold", 0.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not isfinite(value):
            raise InputError(
                f"{folder / 'config.json'}: sparse_threshold is {value!r}, not a number"
            )
        threshold = float(value)
    manifest = read_manifest(folder / "manifest.json")
    dtypes = ["f16"] * len(found) if manifest is None else manifest.dtypes
    if len(dtypes) != len(found):
        raise InputError(
            f"{folder}: holds predictors for {len(found)} layers, but manifest.json is of "
            f"{len(dtypes)}; copy the whole folder again"
        )
    layers = [_read(folder / f"model_{i}.pt", dtypes[i]) for i in sorted(found)]
    if manifest is not None and manifest.ranks != [layer.rank for layer in layers]:
        raise InputError(
            f"{folder / 'manifest.json'}: says ranks {manifest.ranks}, but the files have "
            f"{[layer.rank for layer in layers]}; copy the whole folder again"
        )
    return PredictorSet(layers, threshold, manifest)


def _read(path: Path, dtype: str) -> Predictor:
    want = 'a dict with exactly "fc1.weight" (R, D) and "fc2.weight" (F, R), no biases'
    try:
        # Pages are read when they are used; torch's older format cannot be mapped.
        mmap = is_zipfile(path)
        value = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except (RuntimeError, OSError, EOFError, BadZipFile, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a readable torch file ({reason}); expected {want}"
        ) from error
    except Exception as error:  # pickle.UnpicklingError names the refused global at length
        raise InputError(f"{path}: holds more than tensors; expected {want}") from error
    if not isinstance(value, dict) or set(value) != {"fc1.weight", "fc2.weight"}:
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{path}: holds {keys}, expected {want}")
    fc1, fc2 = value["fc1.weight"], value["fc2.weight"]
    if not all(isinstance(w, torch.Tensor) and w.is_floating_point() for w in (fc1, fc2)):
        raise InputError(f"{path}: holds something else than float tensors, expected {want}")
    fc1, fc2 = fc1.detach(), fc2.detach()  # parameters too
    if fc1.dim() != 2 or fc2.dim() != 2 or fc1.shape[0] != fc2.shape[1] or not len(fc1):
        raise InputError(
            f"{path}: fc1.weight {tuple(fc1.shape)} and fc2.weight {tuple(fc2.shape)} do not fit; "
            f"expected {want}"
        )
    if not (fc1.isfinite().all() and fc2.isfinite().all()):
        raise InputError(f"{path}: holds NaN or infinity; train again")
    if dtype != "f16" and (fc1.shape[0] % BLOCK or fc1.shape[1] % BLOCK):
        raise InputError(
            f"{path}: manifest.json says {dtype}, whose rows lie in blocks of {BLOCK}, but fc1 is "
            f"{tuple(fc1.shape)}; train again"
        )
    if dtype != "f16" and not (
        torch.equal(rounded(fc1, dtype), fc1.float())
        and torch.equal(rounded(fc2, dtype), fc2.float())
    ):
        raise InputError(
            f"{path}: manifest.json says {dtype}, but {dtype} cannot hold these values; train again"
        )
    if dtype != "f16":  # rounded already, as the comparison says
        return Predictor(fc1.float(), fc2.float(), dtype)
    predictor = Predictor(fc1, fc2).stored()
    if not all(bool(weight.isfinite().all()) for weight in predictor.weights):
        raise InputError(
            f"{path}: holds values beyond 65504, which f16 cannot store; scale fc1 down and fc2 up"
        )
    return predictor


def read_manifest(path: Path) -> PredictorManifest | None:
    """The manifest of a predictor folder; None where there is none.

    Raises:
        InputError: It is of another version, or damaged.
    """
    if not path.is_file():
        return None
    value = read_json(path, "the manifest of a `sparsecast train` folder")
    known = {field.name for field in fields(PredictorManifest)}
    if value.get("format_version") != FORMAT_VERSION or set(value) != known:
        raise InputError(
            f"{path}: format version {value.get('format_version')}, expected {FORMAT_VERSION}; "
            "train again"
        )
    if (
        not all(isinstance(value[name], list) for name in ("dtypes", "ranks", "calibration"))
        or not all(isinstance(dtype, str) and dtype in BITS for dtype in value["dtypes"])
        or not isinstance(value["recipe"], dict)
        or value["activation"] not in ("relu", "fatrelu", "drelu")
    ):
        raise InputError(f"{path}: damaged, expected {', '.join(sorted(known))}; train again")
    return PredictorManifest(**value)


def check_fits(
    predictors: PredictorSet,
    where: str,
    *,
    layers: int,
    hidden_size: int,
    ffn_width: int,
    model: str,
) -> None:
    """Refuse predictors of other layers or shapes than `model` has."""
    if len(predictors.layers) != layers:
        raise InputError(
            f"{where}: has predictors for {len(predictors.layers)} layers, but {model} has "
            f"{layers}; give the predictors of this model"
        )
    for i, predictor in enumerate(predictors.layers):
        fc1, fc2 = tuple(predictor.fc1_RD.shape), tuple(predictor.fc2_FR.shape)
        if fc1[1] != hidden_size or fc2[0] != ffn_width:
            raise InputError(
                f"{where}: model_{i}.pt has fc1 {fc1} and fc2 {fc2}, but {model} needs "
                f"(R, {hidden_size}) and ({ffn_width}, R); give the predictors of this model"
            )


def check_belongs(
    predictors: PredictorSet,
    where: str,
    *,
    layers: int,
    hidden_size: int,
    ffn_width: int,
    fingerprint: str,
    model: str,
) -> None:
    """Refuse predictors that were made for another model than `model`."""
    check_fits(
        predictors,
        where,
        layers=layers,
        hidden_size=hidden_size,
        ffn_width=ffn_width,
        model=model,
    )
    manifest = predictors.manifest
    if manifest is not None and manifest.fingerprint != fingerprint:
        raise InputError(
            f"{where}: was trained for {manifest.model} (fingerprint {manifest.fingerprint}), but "
            f"{model} has fingerprint {fingerprint}; train predictors for this model"
        )


def used_otherwise(
    manifest: PredictorManifest, rule: ActivationRule, convention: str, model: str
) -> list[str]:
    """What the manifest says of the predictors' input and of the activation that is not so."""
    found = []
    if manifest.convention != convention:
        found.append(
            f"trained on the input {manifest.convention!r}, but PowerInfer gives predictors of "
            f"{model} the input {convention!r}"
        )
    theirs = ActivationRule(manifest.activation, manifest.activation_threshold)
    if (theirs.on_up, theirs.threshold) != (rule.on_up, rule.threshold):
        lost = f" (--activation-threshold {theirs.threshold:g}?)" if theirs.threshold else ""
        found.append(f"trained for {theirs} in the FFN, but {model} has {rule}{lost}")
    return found


def check_use(
    predictors: PredictorSet, where: str, rule: ActivationRule, convention: str, model: str
) -> None:
    """Refuse predictors that were trained for another input or activation."""
    manifest = predictors.manifest
    if manifest is not None and (odd := used_otherwise(manifest, rule, convention, model)):
        raise InputError(f"{where}: {'; '.join(odd)}; give predictors of this model")
