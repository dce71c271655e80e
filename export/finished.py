"""Whether a bundle is there already, made of the same inputs and with the same options."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.earlier_runs import check_unchanged, compare_options
from sparsecast.core.errors import InputError
from sparsecast.core.files import parse_json
from sparsecast.core.manifests import MANIFEST
from sparsecast.export.bundle import SUFFIX
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.hparams import HParams
from sparsecast.export.write.vocab import Vocabulary
from sparsecast.export.write.writer import KEY_RECIPE
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors


def recipe_of(
    cfg: ExportConfig,
    fingerprint: str,
    hyper: HParams,
    vocabulary: Vocabulary,
    predictors: PredictorSet,
) -> dict[str, Any]:
    """What two exports must share to give the same bundle.

    Args:
        fingerprint: Of the model.
    """
    recorded = None
    if cfg.activations is not None:
        recorded = ActivationStore(cfg.activations).manifest.checksums.get(MANIFEST)
    return {
        "sparsecast": version("sparsecast"),
        "model": fingerprint,
        "config": _digest(repr(hyper)),
        "tokenizer": _digest(repr(vocabulary)),
        "predictors": _weights(predictors),
        "activations": recorded,
        "dtype": cfg.dtype,
        "vram_budget": cfg.vram_budget,
        "vram_context": None if cfg.vram_budget is None else cfg.vram_context,
    }


def find_finished(out: Path, name: str, recipe: dict[str, Any]) -> Path | None:
    """The file of a bundle that was made by `recipe`; None where there is no bundle.

    Args:
        name: The file's.

    Raises:
        InputError: There is one that was made otherwise, or that is damaged.
    """
    found = sorted(out.glob(f"*{SUFFIX}"))
    if not found:
        return None
    advice = "choose another --out or remove the folder"
    try:
        text = GGUFFile(found[0]).keys.get(KEY_RECIPE)
        made = parse_json(text) if isinstance(text, str) else None
        load_predictors(out / "predictor")
    except ValueError as error:  # an `InputError` is one
        raise InputError(f"{out}: holds a damaged bundle ({error}); {advice}") from error
    if not isinstance(made, dict):
        raise InputError(f"{out}: holds a bundle that does not say how it was made; {advice}")
    changed = compare_options({**made, "name": found[0].name}, {**recipe, "name": name})
    check_unchanged(out, "a finished bundle", changed, finished=True)
    return found[0]


def recipe_text(recipe: dict[str, Any]) -> str:
    """As the file has it."""
    return json.dumps(recipe, sort_keys=True, allow_nan=False)


def _weights(predictors: PredictorSet) -> str:
    """Checksum of the manifest, which has every file's; of the weights where there is none."""
    if predictors.manifest is not None:
        return predictors.manifest.checksums.get(MANIFEST, "")
    digest = xxhash.xxh3_128(repr(predictors.threshold).encode())
    for layer in predictors.layers:
        for weight in layer.weights:
            digest.update(weight.numpy().data)
    return digest.hexdigest()


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
