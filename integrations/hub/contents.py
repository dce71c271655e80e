"""Check that a folder is whole and intact before it is pushed, and read what its card says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule
from sparsecast.core.tokenizers.files import check_files
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.base import Check
from sparsecast.export.checks.folders import check_activation_folder, check_card
from sparsecast.export.checks.gpu_split import check_gpu_split
from sparsecast.export.checks.predictors import check_predictors
from sparsecast.export.checks.run import FILE_CHECKS
from sparsecast.export.read.reader import GGUFFile
from sparsecast.integrations.hub.facts import (
    Facts,
    bundle_facts,
    model_facts,
    predictor_facts,
    store_facts,
)
from sparsecast.integrations.hub.files import MODEL_FACTS, Selection
from sparsecast.integrations.hub.public import check_public
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors


def check_contents(selection: Selection, *, shards: bool) -> tuple[Facts, PredictorSet | None]:
    """Check every file that is pushed against its checksums, or by loading it.

    Args:
        shards: Whether the shards of activations are pushed, so read to the end.

    Returns:
        What the card says, and the predictors of a folder that has some.

    Raises:
        InputError: The folder is not whole, or a file is damaged.
    """
    folder = selection.folder
    if selection.kind == "activations":
        return _store(folder, whole=shards), None
    if selection.kind == "predictors":
        return _predictors(folder)
    if selection.kind == "bundle":
        return _bundle(folder)
    return _model(folder), None


def _store(folder: Path, *, whole: bool) -> Facts:
    store = ActivationStore(folder)
    damaged = (what for _, what in store.damages(whole=whole) if what is not None)
    if (what := next(damaged, None)) is not None:
        raise InputError(what)
    return store_facts(store)


def _predictors(folder: Path) -> tuple[Facts, PredictorSet]:
    predictors = load_predictors(folder)
    if predictors.manifest is None:
        raise InputError(
            f"{folder}: holds predictors without a {MANIFEST}, which would say whose they are; "
            "expected a folder that `sparsecast train` wrote"
        )
    return predictor_facts(predictors), predictors


def _bundle(folder: Path) -> tuple[Facts, PredictorSet]:
    file = GGUFFile(bundle_file(folder))
    texts = [value for value in file.keys.values() if isinstance(value, str)]
    check_public(file.path.name, "\n".join(texts).encode(), folder)
    failed = next((check for check in _bundle_checks(file, folder) if not check.ok), None)
    if failed is not None:
        raise InputError(
            f"{file.path}: {failed.name}: {failed.detail}; `sparsecast verify` shows every check; "
            "export again"
        )
    predictors = load_predictors(folder / "predictor")
    return bundle_facts(file, predictors), predictors


def _bundle_checks(file: GGUFFile, folder: Path) -> Iterator[Check]:
    """Run the checks of verify that need neither model nor text; later ones rely on earlier."""
    for check in FILE_CHECKS:
        yield check(file)
    yield from check_predictors(file, None, None)[0]
    yield check_activation_folder(file, folder / "activation")
    yield from check_gpu_split(file, folder)
    yield from check_card(folder)


def _model(folder: Path) -> Facts:
    checkpoint = Checkpoint(str(folder))
    checkpoint.check()
    check_files(folder)
    values = {
        name: read_json(folder / name, "how the model was made")
        for name in MODEL_FACTS
        if os.path.lexists(folder / name)
    }
    config = checkpoint.config
    shape = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    rule = activation_rule(config, str(folder))
    return model_facts(values.get(MODEL_FACTS[0], {}), str(rule), checkpoint.fingerprint, shape)
