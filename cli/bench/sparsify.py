"""`sparsecast bench sparsify`: tokens per second of training, ours beside bare Lightning.

    bare     the model as it is: its own activation, transformers' own loss from all logits at once;
             a LightningModule of a few lines, compiled as a whole
    l1       ProSparse's L1 term on ReLU
    target   one threshold that rises towards a target sparsity, the default of `sparsify`

All train random weights of one shape on the same batches, with the same AdamW, clipping, precision
(float32 on a CPU, bf16 autocast on a GPU) and Lightning Trainer. They take turns round by round;
the first steps of every round, which compile or warm up, are not timed. Medians are reported.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.cli.bench.rounds import device_name, in_rounds, medians
from sparsecast.cli.bench.sparsify_sides import NAMES, Side, Workload, make_side
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log, show
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import family_of
from sparsecast.core.models.loading import pick_device
from sparsecast.core.options import validate_fields
from sparsecast.sparsify.config import PRESETS
from sparsecast.sparsify.plan import SPARSE, activation_name
from sparsecast.sparsify.prepare import preset_config


@dataclass(frozen=True, kw_only=True)
class BenchSparsifyConfig:
    """Time sparsify's training steps against bare Lightning's."""

    model: str | None = None
    """Hugging Face id or folder of a dense model, of which config.json alone is used: weights are
    random. Unset: the shape of --preset."""

    preset: Literal["tiny", "30m"] = "tiny"
    """The shape without --model."""

    batch_size: int = 64
    """Sequences per optimizer step."""

    seq_len: int = 512
    """Tokens per sequence."""

    micro_batch: int | None = None
    """Sequences per forward pass of ours, as in sparsify."""

    checkpoint_activations: bool = False
    """Recompute activations in ours, as in sparsify."""

    steps: int = 20
    """Timed steps per round."""

    warmup: int = 3
    """Steps before them."""

    rounds: int = 3
    """Timed rounds."""

    compile: bool = True
    """torch.compile all of them on a GPU."""

    device: str = "auto"
    """auto, cpu or cuda."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, batch_size=1, seq_len=8, micro_batch=1, steps=1, warmup=1, rounds=1)


def bench_sparsify(cfg: BenchSparsifyConfig) -> dict[str, Any]:
    """Tokens per second, their ratios to the bare model's, and peak memory on a GPU.

    Memory: three models in float32, and of one at a time gradients, two moments and activations.

    Raises:
        InputError: A model that `sparsify` does not take, or a device that is not there.
    """
    check_json(cfg.json)
    device = pick_device(cfg.device)
    torch.set_float32_matmul_precision("high")
    config = _config(cfg)
    step_tokens = cfg.batch_size * cfg.seq_len
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as folder:
        rows = _random_rows(Path(folder), int(config.vocab_size), cfg)
        work = Workload(
            config=config,
            rows=rows,
            batch_size=cfg.batch_size,
            seq_len=cfg.seq_len,
            micro_batch=cfg.micro_batch,
            checkpoint_activations=cfg.checkpoint_activations,
            compile=cfg.compile and device.type == "cuda",
            warmup=cfg.warmup,
            steps=cfg.steps,
            device=device,
        )
        sides: dict[str, Side] = {name: make_side(name, work) for name in NAMES}
        seconds = in_rounds({name: partial(_run, side) for name, side in sides.items()}, cfg.rounds)
    rates = {name: [step_tokens / value for value in found] for name, found in seconds.items()}
    median = medians(rates)
    values = {
        "model": cfg.model or cfg.preset,
        "device": device_name(device),
        "parameters": sides["bare"].parameters,
        "batch_tokens": step_tokens,
        "tokens_per_s": median,
        "over_bare": {name: rate / median["bare"] for name, rate in median.items()},
        "first_step_s": {name: side.first_step for name, side in sides.items()},
        "peak_bytes": {name: side.peak for name, side in sides.items()},
        "runs": rates,
    }
    return publish(values, cfg.json, _show)


def _run(side: Side) -> float:
    return side.seconds_per_step()


def _config(cfg: BenchSparsifyConfig) -> Any:
    if cfg.model is not None:
        config = Checkpoint(cfg.model).config
        family_of(config, cfg.model)
        if (name := activation_name(config)) in SPARSE:
            raise InputError(
                f"--model {cfg.model}: has {name}, expected a dense model, with SiLU or GELU; "
                "choose the model that it was made from"
            )
        return config
    preset = PRESETS[cfg.preset]
    return preset_config(preset, preset.vocab_size, cfg.seq_len)


def _random_rows(folder: Path, vocabulary: int, cfg: BenchSparsifyConfig) -> Path:
    """Write random tokens for a few batches, in the format of `pack_documents`."""
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    path = folder / f"tokens.{np.dtype(dtype).name}"
    count = 4 * cfg.batch_size * cfg.seq_len
    np.random.default_rng(0).integers(vocabulary, size=count, dtype=dtype).tofile(path)
    return path


def _show(values: dict[str, Any]) -> None:
    title = (
        f"{values['model']}, {values['parameters'] / 1e6:,.1f}M parameters, "
        f"{values['batch_tokens']:,} tokens a step, {values['device']}"
    )
    on_gpu = values["peak_bytes"]["bare"] is not None
    columns = ["tokens/s", "times bare", "first step, s", *(["peak GiB"] if on_gpu else [])]
    table = new_table("", *columns, title=title)
    for name, rate in values["tokens_per_s"].items():
        cells = [f"{rate:,.0f}", f"{values['over_bare'][name]:.3f}"]
        cells.append(f"{values['first_step_s'][name]:.1f}")
        if on_gpu:
            cells.append(f"{values['peak_bytes'][name] / 2**30:.2f}")
        table.add_row(NAMES[name], *cells)
    show(table)
    if on_gpu:
        log.info("the very first step compiles; peak GiB are those of one model at a time")
