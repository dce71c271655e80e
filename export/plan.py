"""Resolve an export's options into a plan: model, predictors, counts, tensors and split."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from torch import Tensor

from sparsecast.collect.store.firing import check_firing
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import lost_threshold_warning
from sparsecast.core.run_record import Run, begin_run
from sparsecast.export.bundle import file_name
from sparsecast.export.config import ExportConfig
from sparsecast.export.read.other_tokens import OtherTokens
from sparsecast.export.traffic import Traffic, traffic_of
from sparsecast.export.write.consent import check_other_tokens
from sparsecast.export.write.hot_cold import Split, check_width, split_for
from sparsecast.export.write.hparams import HParams, read_hparams
from sparsecast.export.write.tensor_plan import PlannedTensor, plan_tensors
from sparsecast.export.write.vocab import Vocabulary
from sparsecast.export.write.vocab_reader import read_vocabulary
from sparsecast.export.write.vram import budget_for
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_sizes, mismatches


class Counts(NamedTuple):
    """How often each neuron fired in a recording."""

    layers: list[Tensor]
    """Per layer (F,) int64: tokens of the train and calibration splits."""
    checksum: str | None
    """Checksum of the recording's manifest."""


class GPUBudget(NamedTuple):
    """The GPU memory that a split is for, by PowerInfer's options."""

    gib: float
    """--vram-budget."""
    context: int
    """-c, in tokens."""


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """One export, ready to be written; tensors are read as they are written."""

    out: Path
    file: str
    """Name of the GGUF file."""
    checkpoint: Checkpoint
    hparams: HParams
    vocabulary: Vocabulary
    other_tokens: OtherTokens | None
    """Of how much text the engine makes other tokens; None where it is none."""
    predictors: PredictorSet
    mismatches: list[str]
    """How the predictors differ from the model's own, where --force allows it."""
    counts: Counts | None
    """None without --activations."""
    dtype: str
    tensors: list[PlannedTensor]
    gpu: GPUBudget | None
    split: Split | None
    """The neurons on the GPU; None without --vram-budget."""
    lost_threshold: str | None
    """A warning: the config seems to have lost FATReLU's threshold, and no option gives it."""
    run: Run
    """What run.json says of the export."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the file's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def traffic(self) -> Traffic | None:
        """FFN traffic by the predictors' calibration; None for predictors without scores."""
        if self.predictors.manifest is None:
            return None
        stored = {t.name: (t.type.name.lower(), t.shape) for t in self.tensors}
        return traffic_of(stored, self.predictors.manifest.calibration)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Inputs and options that two exports must share to give the same bundle."""
        return {
            "sparsecast": version("sparsecast"),
            "model": self.checkpoint.fingerprint,
            # Finished bundles hold the digests of these spellings; theirs have no scales.
            "config": _digest(
                repr(self.hparams).replace("HParams(", "Hyper(", 1)
                + ("" if self.hparams.scales is None else repr(self.hparams.scales))
            ),
            "tokenizer": _digest(repr(self.vocabulary).replace(", differences=[])", ")")),
            "predictors": _weights_checksum(self.predictors),
            "activations": None if self.counts is None else self.counts.checksum,
            "dtype": self.dtype,
            "vram_budget": None if self.gpu is None else self.gpu.gib,
            "vram_context": None if self.gpu is None else self.gpu.context,
        }

    @property
    def recipe_text(self) -> str:
        """The recipe as JSON, stored in the file."""
        return json.dumps(self.recipe, sort_keys=True, allow_nan=False)


def plan_export(cfg: ExportConfig) -> ExportPlan:
    """Read and check every input of an export.

    Raises:
        InputError: See `read_hparams`, `read_vocabulary`, `check_other_tokens`, `load_predictors`
            and `plan_tensors`; predictors or activations of another model; an FFN that does not
            divide into the blocks of --vram-budget.
    """
    assert cfg.predictors is not None
    checkpoint = Checkpoint(cfg.model)
    hparams = read_hparams(checkpoint, cfg.activation_threshold)
    vocabulary = read_vocabulary(checkpoint, hparams.vocab)
    other = check_other_tokens(checkpoint, vocabulary, allowed=cfg.allow_other_tokens)
    predictors, wrong = _predictors(cfg.predictors, checkpoint, hparams, force=cfg.force)
    counts = None if cfg.activations is None else _counts(cfg.activations, checkpoint, hparams)
    gpu = None if cfg.vram_budget is None else GPUBudget(cfg.vram_budget, cfg.vram_context)
    tensors = plan_tensors(checkpoint, hparams, predictors, cfg.dtype)
    lost = lost_threshold_warning(checkpoint.config, checkpoint.source)
    return ExportPlan(
        out=cfg.out,
        file=file_name(checkpoint.source),
        checkpoint=checkpoint,
        hparams=hparams,
        vocabulary=vocabulary,
        other_tokens=other,
        predictors=predictors,
        mismatches=wrong,
        counts=counts,
        dtype=cfg.dtype,
        tensors=tensors,
        gpu=gpu,
        split=None if gpu is None or counts is None else _split(gpu, hparams, tensors, counts),
        lost_threshold=lost if cfg.activation_threshold is None else None,
        run=begin_run("export", cfg, checkpoint=checkpoint),
    )


def _predictors(
    folder: Path, checkpoint: Checkpoint, hparams: HParams, *, force: bool
) -> tuple[PredictorSet, list[str]]:
    """Load the predictors, and list how they differ from this model's where `force` allows it."""
    predictors = load_predictors(folder)
    check_sizes(predictors, str(folder), hparams.model_shape, model=checkpoint.source)
    manifest = predictors.manifest
    wrong = [] if manifest is None else mismatches(manifest, checkpoint, hparams.activation)
    if wrong and not force:
        raise InputError(
            f"{folder}: {'; '.join(wrong)}; give predictors of this model, or accept these with "
            "--force"
        )
    return predictors, wrong


def _counts(folder: Path, checkpoint: Checkpoint, hparams: HParams) -> Counts:
    """Count how often each neuron fired in a recording of this model."""
    store = ActivationStore(folder)
    manifest = store.manifest
    if manifest.fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"{folder}: was recorded from {manifest.model} (fingerprint {manifest.fingerprint}), "
            f"but {checkpoint.source} has {checkpoint.fingerprint}; collect from this model"
        )
    if manifest.layers != list(range(hparams.layers)):
        raise InputError(
            f"{folder}: holds layers {manifest.layers}, expected all {hparams.layers}; collect "
            "again without --layers"
        )
    theirs, ours = manifest.rule, hparams.activation
    if (theirs.on_up, theirs.threshold) != (ours.on_up, ours.threshold):
        raise InputError(
            f"{folder}: was recorded with {theirs}, but the export uses {ours}; collect with the "
            "--activation-threshold of this export"
        )
    stats = store.stats()
    check_firing(stats, manifest.layers, str(folder))
    splits = [split for split in stats.splits() if split != "held-out"]
    layers = [stats.fired(layer, splits) for layer in manifest.layers]
    return Counts(layers, manifest.checksums.get(MANIFEST))


def _split(gpu: GPUBudget, hparams: HParams, tensors: list[PlannedTensor], counts: Counts) -> Split:
    check_width(hparams.ffn)
    by_name = {tensor.name: tensor for tensor in tensors}
    return split_for(budget_for(gpu.gib, gpu.context, by_name, hparams), counts.layers)


def _weights_checksum(predictors: PredictorSet) -> str:
    """The manifest's checksum, which covers every file; the weights' own without a manifest."""
    if predictors.manifest is not None:
        return predictors.manifest.checksums.get(MANIFEST, "")
    digest = xxhash.xxh3_128(repr(predictors.threshold).encode())
    for layer in predictors.layers:
        for weight in layer.weights:
            digest.update(weight.numpy().data)
    return digest.hexdigest()


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
