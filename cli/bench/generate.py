"""`sparsecast bench generate`: tokens per second of a model, dense and with sparse FFNs.

    dense       the model as it was loaded
    exact, predicted, auto       the policies of `sparsify_model`

All continue the same prompt greedily, round by round, each with a static cache; on CUDA each step
is compiled into one CUDA graph (see kernels/in_models/decode.py). Every other round runs in reverse
order. Ratios are taken within a round; medians over rounds are reported, for all tokens but the
first. Also reported is how many tokens precede the first that differs from the dense model's. The
models share all weights except the transposed down projections.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.cli.bench.rounds import in_rounds, median_ratio, medians
from sparsecast.core.errors import InputError
from sparsecast.core.hub import local_folder
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
    """Time greedy decoding: dense, exact, predicted, and as the policy auto chooses."""

    model: str
    """Hugging Face id or local folder."""

    predictors: Path
    """Folder written by `sparsecast train`."""

    policies: list[Policy] = field(default_factory=lambda: list(get_args(Policy)))
    """Policies to compare with dense."""

    tokens: int = 128
    """Tokens to generate in every run."""

    rounds: int = 5
    """Runs of each policy."""

    prompt: str = "import os\n"
    """Text to continue, after BOS if the tokenizer has one."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    dtype: ModelDtype = "auto"
    """float32, float16 or bfloat16; auto is the checkpoint's on a GPU, float32 on the CPU."""

    activation_threshold: float | None = None
    """FATReLU threshold, for a model whose config lacks it."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=2, rounds=1, activation_threshold=0)


def bench_generate(cfg: BenchGenerateConfig) -> dict[str, Any]:
    """Tokens per second, speed-ups and equal tokens of every policy.

    Memory beyond the model: a down projection and the predictors for each policy.

    Raises:
        InputError: See `load_model` and `sparsify_model`; more tokens than the model was made for;
            a bundle.
    """
    check_json(cfg.json)
    if is_bundle(local_folder(cfg.predictors, "predictors", "bundle")):
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
    _check_length(cfg, len(prompt_S), max_positions(model))
    models = {"dense": model}
    models |= {name: sparsify_model(_twin(model), cfg.predictors, name) for name in cfg.policies}
    cuda = model.device.type == "cuda"
    values = {
        "model": cfg.model,
        "predictors": str(cfg.predictors),
        "tokens": cfg.tokens,
        "prompt_tokens": len(prompt_S),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if cuda else "cpu",
        "threads": None if cuda else torch.get_num_threads(),
        "rows": _rows(models, prompt_S, cfg.tokens, cfg.rounds),
    }
    return publish(values, cfg.json, _show)


def _check_length(cfg: BenchGenerateConfig, prompt_tokens: int, most: float) -> None:
    """Refuse an empty prompt, and more tokens than the model's `most` positions."""
    if not prompt_tokens:
        raise InputError("--prompt: is empty, and this tokenizer has no BOS; give some text")
    if prompt_tokens + cfg.tokens > most:
        raise InputError(
            f"--tokens: got {cfg.tokens}, but {cfg.model} was made for {most:g} positions and the "
            f"prompt has {prompt_tokens}; choose at most {most - prompt_tokens:g}, or a shorter "
            "--prompt"
        )


def _rows(
    models: dict[str, PreTrainedModel], prompt_S: Tensor, n_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Generate with every model; a row of the JSON report for each.

    The first run of each compiles, gives the tokens and is not timed.
    """
    decoders, tokens = {}, {}
    with progress_bar("warm-up", len(models)) as progress:
        for name, model in models.items():
            decoders[name] = Decoder(model, prompt_S, n_tokens)
            tokens[name], _ = decoders[name].run()
            progress.advance()

    def rate(decoder: Decoder) -> float:
        _, seconds = decoder.run()
        return (n_tokens - 1) / seconds

    measures = {name: partial(rate, decoder) for name, decoder in decoders.items()}
    rates = in_rounds(measures, rounds, alternate=True)
    typical = medians(rates)
    return [
        {
            "policy": name,
            "tokens_per_s": typical[name],
            "speedup": median_ratio(rates[name], rates["dense"]),
            "equal_tokens": _equal(tokens[name], tokens["dense"]),
            "layers": _layers(model),
            "runs": rates[name],
        }
        for name, model in models.items()
    ]


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model that shares its tensors."""
    shared: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _equal(tokens: list[int], dense: list[int]) -> int:
    """How many tokens precede the first that differs."""
    differ = [i for i, (a, b) in enumerate(zip(tokens, dense, strict=True)) if a != b]
    return differ[0] if differ else len(dense)


def _layers(model: PreTrainedModel) -> dict[str, int]:
    """How many layers are dense, exact and predicted."""
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
    table = new_table(
        "", "tokens/s", "of dense", "tokens as dense", "layers",
        left=("", "layers"),
        title=f"{values['tokens']} tokens, {values['dtype']}, {where}",
    )  # fmt: skip
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
