"""What an export will take, before it starts: one layer is converted and written.

The file's size follows from its tensors. A layer and its predictor are written to a file without a
name, on the disk of the output, which is gone when it is closed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch

from sparsecast.core.disk import check_disk_space, nearest_folder
from sparsecast.core.dry_run import PYTHON, UNMEASURED, Forecast, base_memory, show_forecast
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_new_folder
from sparsecast.core.memory import held, most_held, watch_memory
from sparsecast.core.messages import log
from sparsecast.export.bundle import BESIDE, SUFFIX
from sparsecast.export.config import ExportConfig
from sparsecast.export.finished import find_finished, finished_file
from sparsecast.export.plan import ExportPlan, plan_export
from sparsecast.export.run import bundle_bytes
from sparsecast.export.to_gguf.plan import GGUF, GGUFPlan, plan_gguf
from sparsecast.export.to_gguf.run import BESIDE as BESIDE_GGUF
from sparsecast.export.write.convert import one_thread, slabs
from sparsecast.export.write.tensor_plan import PlannedTensor
from sparsecast.predictors.checkpoint import state_of_file
from sparsecast.predictors.predictor import Predictor

HOW = "from one layer, written to a file without a name on that disk"
FIRST = "blk.0."
"""What the names of the first layer's tensors begin with."""
PREDICTOR = ("fc1.weight", "fc2.weight")


@dataclass(frozen=True, kw_only=True)
class Written:
    """One layer, converted and written."""

    own: int
    """Bytes of main memory that it took."""
    weight_seconds: float
    """Per weight of the model."""
    predictor_seconds: float
    """Of a layer's predictor, in the file and in its folder."""


def forecast(cfg: ExportConfig) -> Forecast | None:
    """Show what `export` with these options will take, and return it; None if it is done already.

    Raises:
        InputError: What `export` refuses before it writes; what the disk cannot hold is refused
            after the table.
    """
    start = time.perf_counter()
    plan: ExportPlan | GGUFPlan
    if cfg.format == "gguf":
        check_new_folder(cfg.out, replaces=f"*{GGUF}", beside=BESIDE_GGUF)
        plan = plan_gguf(cfg)
        found = finished_file(plan.out, GGUF, plan.recipe, plan.file)
        need, what = plan.weight_bytes, "the file"
    else:
        check_new_folder(cfg.out, replaces=f"*{SUFFIX}", beside=BESIDE)
        plan = plan_export(cfg)
        found = find_finished(plan)
        need, what = bundle_bytes(plan), "the bundle"
    if found is not None:
        log.info(f"{plan.out}: already exported")
        return None
    base, most = base_memory(torch.device("cpu")), most_held()
    reading = time.perf_counter() - start
    misfit, seconds, own = None, {}, 0
    try:
        check_disk_space(plan.out, need, what)
    except InputError as error:
        misfit = error
    else:
        layer = _write_layer(plan)
        weights = sum(_weights(t) for t in plan.tensors if not t.name.endswith(PREDICTOR))
        seconds = {
            "reading the inputs": reading,
            "the model": weights * layer.weight_seconds,
            "predictors": len(_predictors(plan)) * layer.predictor_seconds,
        }
        own = layer.own
    stored = plan.checkpoint.config.dtype
    itemsize = stored.itemsize if isinstance(stored, torch.dtype) else 4
    largest = itemsize * max(_weights(tensor) for tensor in plan.tensors)
    result = Forecast(
        what=f"{plan.out}: export",
        out=plan.out,
        disk=need,
        device=torch.device("cpu"),
        host={PYTHON: base, "a layer": own},
        # A tensor while it is written, or what was mapped around the few values of the fingerprint.
        pages=max(largest, most - base - own),
        seconds=seconds,
        note=HOW if seconds else UNMEASURED,
    )
    show_forecast(result)
    if misfit is not None:
        raise misfit
    return result


def _write_layer(plan: ExportPlan | GGUFPlan) -> Written:
    """Write the first layer's tensors and its predictor."""
    layer = [tensor for tensor in plan.tensors if tensor.name.startswith(FIRST)]
    model = [tensor for tensor in layer if not tensor.name.endswith(PREDICTOR)]
    predictor = [tensor for tensor in layer if tensor.name.endswith(PREDICTOR)]
    before = held().own
    with watch_memory() as peak:
        model_seconds = _written(plan.out, partial(_convert, model))
        predictor_seconds = _written(plan.out, partial(_convert, predictor))
        if predictors := _predictors(plan):
            _written(plan.out, partial(_save, predictors[0]))  # the allocator keeps some of it
            predictor_seconds += _written(plan.out, partial(_save, predictors[-1]))
    return Written(
        own=max(0, peak.own - before),
        weight_seconds=model_seconds / sum(map(_weights, model)),
        predictor_seconds=predictor_seconds,
    )


def _convert(tensors: Iterable[PlannedTensor], file: IO[bytes]) -> None:
    with one_thread():
        for tensor in tensors:
            for rows in slabs(tensor):
                file.write(rows.data)


def _save(predictor: Predictor, file: IO[bytes]) -> None:
    torch.save(state_of_file(predictor), file)


def _written(out: Path, write: Callable[[IO[bytes]], object]) -> float:
    """Return the seconds until what `write` writes is on the disk of `out`."""
    with TemporaryFile(dir=nearest_folder(out.parent)) as file:
        start = time.perf_counter()
        write(file)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - start


def _predictors(plan: ExportPlan | GGUFPlan) -> list[Predictor]:
    return plan.predictors.layers if isinstance(plan, ExportPlan) else []


def _weights(tensor: PlannedTensor) -> int:
    return math.prod(tensor.shape)
