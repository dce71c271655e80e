"""Resolve the options of `sparsecast train` into one plan, and refuse what cannot be trained.

Only this module, train.py and train_dry_run.py see `TrainConfig`; everything below reads the plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sparsecast.collect.output import output_folder
from sparsecast.collect.store.firing import check_firing
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import refuse_experts
from sparsecast.core.models.loading import pick_device
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.models.shape import ModelShape, model_shape
from sparsecast.core.run_record import Run, begin_run
from sparsecast.predictors.config import (
    DEFAULT_LONG_DOCUMENTS,
    DEFAULT_SEQ_LEN,
    DEFAULT_TOKENS,
    TrainConfig,
)
from sparsecast.predictors.formats import check_widths
from sparsecast.predictors.recorded_model import check_recorded
from sparsecast.predictors.training.expert_data import LEAST_ROWS, trained_ffns
from sparsecast.predictors.training.layer_parallel import layers_of_process
from sparsecast.predictors.training.needs import check_fits
from sparsecast.predictors.training.online import TrainingText, open_online_source
from sparsecast.predictors.training.plan import TrainingPlan, resume_options, work_folder
from sparsecast.predictors.training.rank_selection import (
    check_traffic_budget,
    default_dtype,
    default_rank,
    ranks_within_budget,
)
from sparsecast.predictors.training.source import RecordedSource, Source
from sparsecast.predictors.training.trainer import check_unfinished, ranks_of_unfinished

SPLITS_READ = ("train", "calibration")
_SETTLED = ("predictor_dtype", "loss", "epochs", "batch_size", "lr", "seq_len", "long_documents")
"""Options that may be unset, as `TrainingRequest.options` has them."""


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """The options of one command, its inputs opened; known before a running model records text."""

    cfg: TrainConfig
    out: Path
    """--out with links followed."""
    device: torch.device
    context: DistributedContext
    finished: bool
    """Whether an earlier run has finished --out."""
    store: ActivationStore | None
    """Recorded activations; None for a running model."""
    fingerprint: str
    num_layers: int
    """Predictors: one per layer, or per expert."""
    hidden_size: int

    @property
    def dtype(self) -> str:
        """Stored format of the predictors."""
        return self.cfg.predictor_dtype or default_dtype(self.cfg.recipe, self.hidden_size)

    @property
    def loss(self) -> str:
        """--loss, or its default.

        Raises:
            InputError: value without energies.
        """
        if self.store is not None and self.cfg.loss == "value" and not self.store.manifest.energy:
            what = "leave it out" if self.store.manifest.experts else "collect with --energy true"
            raise InputError(
                f"--loss value: {self.store.folder} has no energies to weigh misses by; {what}"
            )
        known = self.store is None or self.store.manifest.energy
        return self.cfg.loss or ("value" if known and self.cfg.recipe == "default" else "count")

    @property
    def processes_per_batch(self) -> int:
        """Processes that share the batches of one step."""
        return self.context.size if self.cfg.data_parallel else 1

    @cached_property
    def run(self) -> Run:
        """What run.json says of the command, before the ranks are known."""
        return begin_run("train", self.cfg, device=self.device)

    @cached_property
    def options(self) -> dict[str, Any]:
        """What two runs must share to train the same predictors, as manifest.json records it."""
        options = asdict(self.cfg)
        read = ("tokens", "seq_len", "long_documents")
        for name in ("activations", "out", "device", "model", "dry_run", *read):
            options.pop(name)
        schedule, sharing = self.cfg.schedule, self.processes_per_batch
        options |= {
            "predictor_dtype": self.dtype,
            "loss": self.loss,
            "epochs": schedule.num_epochs,
            "batch_size": schedule.batch_tokens,
            "lr": schedule.peak_lr,
            "fingerprint": self.fingerprint,
        }
        if self.store is None:
            steps = self.cfg.steps_per_epoch(sharing) * schedule.num_epochs
            seq_len = self.cfg.seq_len or DEFAULT_SEQ_LEN
            tokens = steps * schedule.batch_tokens * sharing
            long_documents = self.cfg.long_documents or DEFAULT_LONG_DOCUMENTS
            return options | {
                "train_tokens": tokens,
                "seq_len": seq_len,
                "long_documents": long_documents,
            }
        recorded = self.store.manifest
        return options | {
            "calibration_tokens": recorded.tokens("calibration"),
            "activations": self.store.checksum,
            "corpus": recorded.corpus,
            "train_tokens": recorded.tokens("train"),
        }


def resolve(cfg: TrainConfig, context: DistributedContext) -> TrainingRequest:
    """Open the inputs, follow links in --out and pick the device of this process.

    Raises:
        InputError: --out or --device cannot be used, no finished store, a store that lacks a layer,
            or a model that cannot be read.
    """
    out = output_folder(cfg.out)
    finished = (out / MANIFEST).is_file()
    device = pick_device(context.device(cfg.device))
    if cfg.activations is not None:
        store = ActivationStore(cfg.activations)
        recorded = store.manifest
        num_layers = recorded.model_shape.ffns
        if recorded.layers != list(range(len(recorded.layers))):
            raise InputError(
                f"{cfg.activations}: holds layers {recorded.layers}, but predictors need every "
                "layer from 0 on; collect without --layers"
            )
        fingerprint, hidden_size = recorded.fingerprint, recorded.hidden_size
    else:
        assert cfg.model is not None
        store, checkpoint = None, Checkpoint(cfg.model)
        refuse_experts(
            checkpoint.config,
            cfg.model,
            "predictors of experts are trained on recorded activations: run sparsecast collect, "
            "then give --activations",
        )
        if not finished:
            checkpoint.check()
        config: Any = checkpoint.config
        fingerprint = checkpoint.fingerprint
        num_layers, hidden_size = config.num_hidden_layers, config.hidden_size
    return TrainingRequest(
        cfg=cfg,
        out=out,
        device=device,
        context=context,
        finished=finished,
        store=store,
        fingerprint=fingerprint,
        num_layers=num_layers,
        hidden_size=hidden_size,
    )


def check_before_recording(request: TrainingRequest) -> None:
    """Refuse what can be refused before a running model records its calibration documents."""
    check_fits(plan_before_recording(request))
    check_unfinished_run(request)


def check_unfinished_run(request: TrainingRequest) -> None:
    """Raise `InputError` if an interrupted run on a running model had other options."""
    resumed = resume_options(request.options, request.processes_per_batch)
    check_unfinished(work_folder(request.out), resumed)


def open_source(request: TrainingRequest) -> Source:
    """Open the source of training batches; a running model records its calibration documents."""
    if request.store is not None:
        return RecordedSource(request.store)
    return open_online_source(training_text(request))


def training_text(request: TrainingRequest) -> TrainingText:
    """The running model and the text that it reads."""
    cfg = request.cfg
    assert cfg.model is not None
    assert cfg.corpus is not None
    return TrainingText(
        model=cfg.model,
        corpus=cfg.corpus,
        tokens=cfg.tokens or DEFAULT_TOKENS,
        seq_len=cfg.seq_len or DEFAULT_SEQ_LEN,
        long_documents=cfg.long_documents or DEFAULT_LONG_DOCUMENTS,
        dtype=cfg.dtype,
        device=str(request.device),
        activation_threshold=cfg.activation_threshold,
        out=request.out,
    )


def make_plan(request: TrainingRequest, source: Source) -> TrainingPlan:
    """Resolve every option, and refuse what can be refused before training.

    Memory: one (D, D) and one (F, D) matrix if ranks are chosen under a budget.

    Raises:
        InputError: An unfinished run with other options, another model than the recorded one,
            damaged or silent activations, or a rank, format or budget that cannot be met.
    """
    cfg, context, store = request.cfg, request.context, source.store
    recorded, options = store.manifest, request.options
    if request.store is None:
        options = options | {"calibration_tokens": recorded.tokens("calibration")}
    if recorded.experts:
        _refuse_for_experts(request)
    sharing = request.processes_per_batch
    check_unfinished(work_folder(request.out), resume_options(options, sharing))
    if request.store is not None:
        if cfg.model is not None:
            check_recorded(cfg.model, store)
        if context.leads:
            check_firing(store.stats(), recorded.ffns, str(cfg.activations), SPLITS_READ)
            store.check("calibration")  # damage there would end the first epoch
    every_layer = cfg.data_parallel or cfg.recipe == "svd"
    own_layers = layers_of_process(trained_ffns(store), context, every_layer)
    if rare := len(recorded.ffns) - len(own_layers) if recorded.experts else 0:
        log.warning(
            f"{cfg.activations}: {rare} of {len(recorded.ffns)} experts have fewer than "
            f"{LEAST_ROWS['train']} training or {LEAST_ROWS['calibration']} calibration tokens; "
            "their predictors select every neuron; collect more --tokens"
        )
    return _plan(request, recorded.model_shape, _ranks(request, store), own_layers, options)


def plan_before_recording(request: TrainingRequest) -> TrainingPlan:
    """The plan of a running model before it records its calibration documents."""
    assert request.cfg.model is not None
    shape = model_shape(empty_model(Checkpoint(request.cfg.model).config))
    own_layers = layers_of_process(range(shape.layers), request.context, request.cfg.data_parallel)
    ranks = _equal_ranks(request, shape)
    return _plan(request, shape, ranks, own_layers, request.options)


def _plan(
    request: TrainingRequest,
    shape: ModelShape,
    ranks: list[int],
    own_layers: list[int],
    options: dict[str, Any],
) -> TrainingPlan:
    cfg = request.cfg
    resolved = {name: value for name, value in options.items() if name in _SETTLED}
    return TrainingPlan(
        out=request.out,
        recipe=cfg.recipe,
        shape=shape,
        dtype=request.dtype,
        ranks=ranks,
        schedule=cfg.schedule,
        steps_per_epoch=None if request.store else cfg.steps_per_epoch(request.processes_per_batch),
        objective=cfg.objective,
        loss=request.loss,
        model=cfg.model,
        clip_labels=cfg.clip_labels,
        own_layers=own_layers,
        device=request.device,
        context=request.context,
        data_parallel=cfg.data_parallel,
        options=options,
        run=request.run.resolve(rank=ranks, **resolved),
    )


def _refuse_for_experts(request: TrainingRequest) -> None:
    """Refuse the options that only dense models support."""
    cfg = request.cfg
    given = {
        "--recipe reference": cfg.recipe == "reference",
        "--target-perplexity": cfg.target_perplexity is not None,
        "--traffic-budget": cfg.traffic_budget is not None,
        "--predictor-budget": cfg.predictor_budget is not None,
        f"torchrun with {request.context.size} processes": request.context.size > 1,
    }
    if option := next((name for name, is_given in given.items() if is_given), None):
        raise InputError(
            f"{option}: is for dense models, and {cfg.activations} holds a mixture of experts; "
            "train it in one process with --recipe default or svd, to --target-recall or "
            "--target-sparsity"
        )


def _ranks(request: TrainingRequest, store: ActivationStore) -> list[int]:
    """The rank of every layer, bias units included."""
    cfg, shape = request.cfg, store.manifest.model_shape
    if cfg.predictor_budget is None:
        return _equal_ranks(request, shape)
    # Chosen once: other sums, as of more CPU threads, may choose otherwise.
    ranks = ranks_of_unfinished(work_folder(request.out), request.num_layers)
    if ranks is None:
        budget, recall = cfg.predictor_budget, cfg.objective.recall
        ranks = ranks_within_budget(budget, recall, store, request.dtype, request.device)
    _check_ranks(request, shape, ranks)
    return ranks


def _equal_ranks(request: TrainingRequest, shape: ModelShape) -> list[int]:
    """One rank for all layers: --rank, or the default."""
    cfg, hidden_size = request.cfg, request.hidden_size
    if cfg.rank is None:
        # An expert may be narrower than the residual stream; a rank beyond its width gains nothing.
        narrow = min(hidden_size, shape.ffn_width) if shape.experts else hidden_size
        rank = default_rank(cfg.recipe, request.dtype, narrow)
    elif cfg.rank > (most := 2 * hidden_size):
        raise InputError(
            f"--rank: got {cfg.rank}, expected at most twice the hidden size, {most}: more units "
            "than that have nothing to start from"
        )
    else:
        rank = cfg.rank
    ranks = [rank] * request.num_layers
    _check_ranks(request, shape, ranks)
    return ranks


def _check_ranks(request: TrainingRequest, shape: ModelShape, ranks: list[int]) -> None:
    for rank in set(ranks):
        check_widths(request.dtype, rank=rank, hidden_size=request.hidden_size)
    if (budget := request.cfg.traffic_budget) is not None:
        check_traffic_budget(budget, shape, request.dtype, ranks)
