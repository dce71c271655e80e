"""What a training run will take, before it starts; train_measure.py measures it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat

from sparsecast.collect.dry_run import measure_recording
from sparsecast.collect.outline import make_outline
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.distributed import distributed_context
from sparsecast.core.dry_run import (
    PYTHON,
    UNMEASURED,
    Forecast,
    base_memory,
    check_forecast,
    extrapolate,
    show_forecast,
)
from sparsecast.core.errors import InputError
from sparsecast.core.memory import held
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.first_layers import Measured, model_memory
from sparsecast.core.models.loading import check_checkpoint, pick_dtype
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.models.shape import weight_bytes
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.planning import (
    SPLITS_READ,
    TrainingRequest,
    check_unfinished_run,
    make_plan,
    plan_before_recording,
    resolve,
    training_text,
)
from sparsecast.predictors.train import finished_predictors
from sparsecast.predictors.train_measure import (
    Batches,
    Steps,
    calibration_seconds,
    measure_steps,
    moment_seconds,
    random_batches,
    regression_seconds,
)
from sparsecast.predictors.training.needs import (
    check_fits,
    missing_bytes,
    state_bytes,
    trained_together,
)
from sparsecast.predictors.training.online import POOL, calibration_recording, warm_tokens
from sparsecast.predictors.training.plan import TrainingPlan
from sparsecast.predictors.training.source import RecordedSource, calibration_batches

WARM, STEPS, CHECKS = "warm start", "steps", "scores of every epoch"
CALIBRATION = "calibration"
STATE = "weights, their training state"
HOW = "from steps on a few layers"
WITHOUT_SEARCH = "; without the search for --target-perplexity"
SVD = "not measured for --recipe svd, which trains nothing"


def forecast(cfg: TrainConfig) -> Forecast | None:
    """Show what `train` with these options will take, and return it; None on other ranks.

    Under torchrun the first rank measures its own share. Nothing is written.

    Raises:
        InputError: What `train` refuses before it begins; or a run that the disk or the memory
            cannot hold, after the table.
    """
    with distributed_context() as context:
        if not context.leads:
            return None
        request = resolve(cfg, context)
        if request.finished:
            finished_predictors(request)
            return None
        found, misfit = _recorded(request) if request.store else _online(request)
        show_forecast(found)
        if misfit is not None:
            raise misfit
        check_forecast(found, "choose a smaller --rank or --batch-size")
        return found


def _recorded(request: TrainingRequest) -> tuple[Forecast, InputError | None]:
    """Forecast training on recorded activations; also return what refuses it, if anything does."""
    assert request.store is not None
    store, source = request.store, RecordedSource(request.store)
    plan = make_plan(request, source)
    base, own = base_memory(plan.device), held().own
    misfit = _misfit(plan)
    seconds: dict[str, float] = {}
    steps: dict[int, Steps] = {}
    if misfit is None and plan.recipe != "svd":
        groups = list(plan.groups()) if plan.shape.experts else [plan]
        largest = max(groups, key=lambda group: len(group.own_layers))
        steps = _some(largest, lambda cut: chain.from_iterable(repeat(source.batches(cut))))
        seconds = dict.fromkeys((WARM, STEPS, CHECKS), 0.0)
        for group in groups:
            rows = _rows(store, "train", len(groups), len(group.own_layers))
            seconds[WARM] += _warm_start(group, rows)
            batches = (len(source.batches(group)), len(calibration_batches(store, group)))
            seconds[STEPS] += batches[0] * _of_all(group, steps, "step_seconds")
            seconds[CHECKS] += batches[1] * _of_all(group, steps, "check_seconds")
        rows = _rows(store, "calibration", len(groups), plan.shape.layers)
        seconds[CALIBRATION] = len(groups) * rows * calibration_seconds(largest)
    searched = plan.objective.perplexity is not None and plan.model is not None
    model = {"the model, for --target-perplexity": _model_bytes(plan)} if searched else {}
    host, on_device = _memory(plan, steps, own, model)
    found = Forecast(
        what=f"{plan.out}: train",
        out=plan.out,
        disk=missing_bytes(plan),
        device=plan.device,
        host={PYTHON: base, **host},
        pages=_pages(plan, store),
        on_device=on_device,
        seconds=seconds,
        note=HOW + (WITHOUT_SEARCH if searched else "") if seconds else _why(misfit),
        processes=plan.context.size,
    )
    return found, misfit


def _pages(plan: TrainingPlan, store: ActivationStore) -> int:
    """Return the bytes of the shards that this process reads, in its own layers."""
    shards = [path for split in SPLITS_READ for path in store.folder.glob(f"{split}-*")]
    share = len(plan.own_layers) / len(store.manifest.ffns)
    return round(share * sum(path.stat().st_size for path in shards))


def _rows(store: ActivationStore, split: str, groups: int, layers: int) -> int:
    """Return the rows of all layers of a group: those routed to a layer's experts, or every token
    of `layers` dense layers."""
    tokens = store.manifest.tokens(split)
    return tokens * (store.manifest.experts_per_token if store.manifest.experts else layers)


def _warm_start(plan: TrainingPlan, rows: float) -> float:
    """Return the seconds of the moments and regressions of a group."""
    if plan.recipe != "default" or plan.checkpoint.is_file():
        return 0.0
    return rows * moment_seconds(plan) + len(plan.own_layers) * regression_seconds(plan)


def _of_all(plan: TrainingPlan, steps: Mapping[int, Steps], name: str) -> float:
    """Return the seconds of every epoch's batch of all layers of a group."""
    seconds = {count: float(getattr(measured, name)) for count, measured in steps.items()}
    return plan.schedule.num_epochs * extrapolate(len(plan.own_layers), seconds)


def _some(plan: TrainingPlan, batches: Batches) -> dict[int, Steps]:
    """Measure two numbers of layers; of fewer the allocator keeps more than their share."""
    layers = len(plan.own_layers)
    counts = (2, 4) if layers >= 4 else {1, layers}
    return {count: measure_steps(plan, batches, count) for count in sorted(counts)}


def _misfit(plan: TrainingPlan) -> InputError | None:
    try:
        check_fits(plan)
    except InputError as error:
        return error
    return None


def _why(misfit: InputError | None) -> str:
    return SVD if misfit is None else UNMEASURED


def _memory(
    plan: TrainingPlan, steps: Mapping[int, Steps], own: int, model: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return main memory and a GPU's memory by use, at the step that takes the most of it.

    Args:
        own: Main memory of the process before it trained.
        model: Main memory of a model that calibration loads.
    """
    layers = len(plan.own_layers)
    if plan.shape.experts:
        layers = max(len(group.own_layers) for group in plan.groups())
    weights, state = trained_together(plan), state_bytes(plan)
    on_gpu = plan.device.type == "cuda"
    train = {STATE: 0 if on_gpu else state}
    device = {STATE: state}
    if steps:
        host = extrapolate(layers, {count: s.host - own for count, s in steps.items()})
        train["batches, rounded weights"] = max(0, round(host) - train[STATE])
        whole = extrapolate(layers, {count: s.on_device for count, s in steps.items()})
        device["batches, rounded weights"] = max(0, round(whole) - state)
    d, f = plan.shape.hidden_size, plan.shape.ffn_width
    regression = {
        "weights": 4 * weights,
        "regression of a layer": 0 if on_gpu else 4 * (5 * f * d + 8 * d * d),
    }
    calibration = {"predictors of all layers": 4 * weights, **model}
    uses = [train, regression if plan.recipe == "default" else {}, calibration]
    return max(uses, key=lambda use: sum(use.values())), device if on_gpu else {}


def _model_bytes(plan: TrainingPlan) -> int:
    """Return the bytes of the recorded model's weights on the CPU or a GPU."""
    assert plan.model is not None
    config = Checkpoint(plan.model).config
    return weight_bytes(empty_model(config), pick_dtype("auto", config.dtype, plan.device))


def _online(request: TrainingRequest) -> tuple[Forecast, InputError | None]:
    """Forecast training on a running model."""
    check_unfinished_run(request)
    text, plan = training_text(request), plan_before_recording(request)
    recording, shares = calibration_recording(text)
    checkpoint = Checkpoint(text.model)
    check_checkpoint(checkpoint)
    outline = make_outline(recording, checkpoint, shares)
    base, own = base_memory(plan.device), held().own
    misfit = _misfit(plan)
    seconds: dict[str, float] = {}
    steps: dict[int, Steps] = {}
    model: list[Measured] = []
    layers, tokens = len(plan.own_layers), plan.schedule.batch_tokens
    assert plan.steps_per_epoch is not None
    if misfit is None:
        model = [measure_recording(recording, checkpoint, outline, count) for count in (1, 2)]
        steps = _some(plan, random_batches)
        read = plan.steps_per_epoch * plan.schedule.num_epochs * tokens
        warm = warm_tokens(text, plan.shape.hidden_size) if plan.recipe == "default" else 0
        calibration = sum(outline.tokens.values())
        forward = extrapolate(plan.shape.layers, {1: model[0].seconds, 2: model[1].seconds})
        seconds = {
            "loading, twice": 2 * model[1].load_seconds * outline.needs.model / model[1].weights,
            "the model": forward * (read + warm + calibration),
            WARM: _warm_start(plan, warm * layers),
            STEPS: plan.steps_per_epoch * _of_all(plan, steps, "step_seconds"),
            CHECKS: calibration / tokens * _of_all(plan, steps, "check_seconds"),
            CALIBRATION: calibration * layers * calibration_seconds(plan),
        }
    host, on_device = _memory(plan, steps, own, {})
    d, f = plan.shape.hidden_size, plan.shape.ffn_width
    row_bytes = 2 * d + f // 8 + f * (plan.loss == "value")
    pool = 2 * POOL * tokens * layers * row_bytes
    model_host, pages, model_device = model_memory(
        checkpoint,
        plan.device,
        outline.dtype,
        outline.needs.model,
        model[0] if model else None,
        {} if on_device else {"pooled batches": pool},
    )
    found = Forecast(
        what=f"{plan.out}: train",
        out=plan.out,
        disk=missing_bytes(plan) + outline.needs.store,
        device=plan.device,
        host={PYTHON: base, **_named(model_host), **host},
        pages=pages,
        on_device={**_named(model_device), **on_device, "pooled batches": pool}
        if on_device
        else {},
        seconds=seconds,
        note=HOW if seconds else _why(misfit),
        processes=plan.context.size,
    )
    return found, misfit


def _named(model: Mapping[str, int]) -> dict[str, int]:
    return {f"the model's {name}" if name == "weights" else name: n for name, n in model.items()}
