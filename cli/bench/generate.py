"""`sparsecast bench generate`: tokens per second of a real model, dense and with sparse FFNs.

    dense       the model as it was loaded
    exact, predicted, auto       the policies of `sparsify_model`

All decode the same prompt greedily, round by round, each with a static cache; on CUDA each step is
compiled and one CUDA graph (decode.py). Every other round runs backwards; ratios are taken within a
round, and medians reported, of all tokens but the first. Beside them stands how many tokens come
before the first that is not the dense model's. The models share their weights but for the
transposed down projections.
"""

from __future__ import annotations

import copy
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from transformers import PreTrainedModel

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import show
from sparsecast.core.models.loading import load_model, max_positions
from sparsecast.core.options import ModelDtype, validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.tokens import encode
from sparsecast.kernels.in_models.bundle import is_bundle
from sparsecast.kernels.in_models.decode import Decoder
from sparsecast.kernels.in_models.sparse_ffn import SparseFFN
from sparsecast.kernels.in_models.sparsify import sparsify_model

Policy = Literal["exact", "predicted", "auto"]


@dataclass(frozen=True, kw_only=True)
class BenchGenerateConfig:
    """Tokens per second of greedy decoding: dense, exact, predicted, and as auto chooses."""

    model: str
    """Hugging Face id or local folder."""

    predictors: Path
    """Folder written by `sparsecast train`."""

    policies: list[Policy] = field(default_factory=lambda: list(get_args(Policy)))
    """What to compare with dense."""

    tokens: int = 128
    """Tokens to generate in every run."""

    rounds: int = 5
    """Runs of each policy."""

    prompt: str = "import os\n"
    """What all of them continue, behind BOS where the tokenizer has one."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    dtype: ModelDtype = "auto"
    """float32, float16 or bfloat16; auto is the checkpoint's on a GPU, float32 on the CPU."""

    activation_threshold: float | None = None
    """FATReLU's threshold where the model's config has lost it."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=2, rounds=1, activation_threshold=0)


def bench(cfg: BenchGenerateConfig) -> dict[str, Any]:
    """Run it. Memory beyond the model: a down projection and the predictors for each policy.

    Raises:
        InputError: See `load_model` and `sparsify_model`; more tokens than the model was made for;
            a bundle.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    if is_bundle(cfg.predictors):
        raise InputError(
            f"--predictors: {cfg.predictors} is a bundle, whose weights would replace the dense "
            "model's; give the predictor folder inside it"
        )
    model, tokenizer = load_model(
        cfg.model,
        device=cfg.device,
        dtype=cfg.dtype,
        activation_threshold=cfg.activation_threshold,
    )
    prompt_S = torch.tensor(encode(tokenizer, cfg.prompt, sys.maxsize), dtype=torch.int64)
    if not len(prompt_S):
        raise InputError("--prompt: is empty, and this tokenizer has no BOS; give some text")
    most = max_positions(model)
    if len(prompt_S) + cfg.tokens > most:
        raise InputError(
            f"--tokens: got {cfg.tokens}, but {cfg.model} was made for {most:g} positions and the "
            f"prompt has {len(prompt_S)}; choose at most {most - len(prompt_S):g}, or a shorter "
            "--prompt"
        )
    models = {"dense": model}
    models |= {name: sparsify_model(_twin(model), cfg.predictors, name) for name in cfg.policies}
    rates: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, list[int]] = {}
    with progress_bar("bench", (cfg.rounds + 1) * len(models)) as progress:
        decoders = {}
        for name, one in models.items():
            decoders[name] = Decoder(one, prompt_S, cfg.tokens)
            tokens[name], _ = decoders[name].run()
            progress.advance()
        for number in range(cfg.rounds):
            order = list(models) if number % 2 == 0 else list(models)[::-1]
            for name in order:
                _, seconds = decoders[name].run()
                rates[name].append((cfg.tokens - 1) / seconds)
                progress.advance()
    cuda = model.device.type == "cuda"
    rows = [
        {
            "policy": name,
            "tokens_per_s": statistics.median(rates[name]),
            "speedup": statistics.median(
                rate / dense for rate, dense in zip(rates[name], rates["dense"], strict=True)
            ),
            "equal_tokens": _equal(tokens[name], tokens["dense"]),
            "layers": _layers(models[name]),
            "runs": rates[name],
        }
        for name in models
    ]
    values = {
        "model": cfg.model,
        "predictors": str(cfg.predictors),
        "tokens": cfg.tokens,
        "prompt_tokens": len(prompt_S),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if cuda else "cpu",
        "threads": None if cuda else torch.get_num_threads(),
        "rows": rows,
    }
    _show(values)
    if cfg.json is not None:
        write_json(cfg.json, values)
    return values


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same tensors."""
    shared: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _equal(tokens: list[int], dense: list[int]) -> int:
    """How many come before the first that differs."""
    differ = [i for i, (a, b) in enumerate(zip(tokens, dense, strict=True)) if a != b]
    return differ[0] if differ else len(dense)


def _layers(model: PreTrainedModel) -> dict[str, int]:
    """How many layers go which way."""
    sparse = [module for module in model.modules() if isinstance(module, SparseFFN)]
    predicted = sum(module.predicts for module in sparse)
    total = int(model.config.num_hidden_layers)
    return {
        "dense": total - len(sparse),
        "exact": len(sparse) - predicted,
        "predicted": predicted,
    }


def _show(values: dict[str, Any]) -> None:
    where = values["device"]
    if values["threads"] is not None:
        where += f", {values['threads']} thread(s)"
    table = Table(
        title=f"{values['tokens']} tokens, {values['dtype']}, {where}", title_justify="left"
    )
    for name in ("", "tokens/s", "of dense", "tokens as dense", "layers"):
        table.add_column(name, justify="left" if name in ("", "layers") else "right")
    for row in values["rows"]:
        layers = ", ".join(f"{count} {name}" for name, count in row["layers"].items() if count)
        table.add_row(
            row["policy"],
            f"{row['tokens_per_s']:,.1f}",
            f"{row['speedup']:.2f}",
            str(row["equal_tokens"]),
            layers,
        )
    show(table)
