"""The stage: perplexity with the predictors in the loop.

    dense       the model as it is
    exact       up only where the gate fired, down only over what is active; no predictor
    predicted   the predictor's mask AND the model's own activation
    bundle      the predictor's mask and plain ReLU, weights rounded to f16, as PowerInfer has it

Same tokens and the same BOS for all, exp of the mean NLL. `predicted` and `bundle` differ for
FATReLU models, whose threshold PowerInfer does not know.

Shape letters: B batch, S sequence, T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.collect.activations import ActivationRule
from sparsecast.collect.atomic import write_json
from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.corpus import documents
from sparsecast.collect.errors import InputError
from sparsecast.collect.families import activation_rule, family_of
from sparsecast.collect.models import embedding_rows, ffn_shape, load_model, set_activation
from sparsecast.collect.perplexity import perplexity
from sparsecast.collect.progress import bar, console
from sparsecast.collect.splits import assign
from sparsecast.collect.tokens import TokenBatch, batches
from sparsecast.predictors.checkpoint import PredictorSet, check_belongs, load_predictors
from sparsecast.predictors.config import EvaluateConfig

MODES = ("dense", "exact", "predicted", "bundle")


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Perplexities and their change against dense; written to `cfg.json` where asked.

    Memory beyond the model: one batch's logits and one layer's mask.

    Raises:
        InputError: See `load_model`, `load_predictors`, `check_belongs` and `documents`; no
            held-out text in the corpus.
    """
    predictors = load_predictors(cfg.predictors)
    model, tokenizer = load_model(
        cfg.model,
        device=cfg.device,
        dtype=cfg.dtype,
        activation_threshold=cfg.activation_threshold,
    )
    layers, hidden_size, ffn_width = ffn_shape(model)
    check_belongs(
        predictors,
        str(cfg.predictors),
        layers=layers,
        hidden_size=hidden_size,
        ffn_width=ffn_width,
        fingerprint=Checkpoint(cfg.model).fingerprint,
        model=cfg.model,
    )
    data = list(
        batches(
            assign(documents(cfg.corpus, seq_len=cfg.seq_len)),
            tokenizer,
            {"held-out": cfg.tokens},
            seq_len=cfg.seq_len,
            batch_size=cfg.batch_size,
            vocabulary=embedding_rows(model),
        )
    )
    if not data:
        raise InputError(f"{cfg.corpus}: no held-out token; give more text, in more files")
    values = perplexities(model, predictors, data)
    dense = values["dense"]
    result = {
        "tokens": sum(batch.tokens for batch in data),
        "perplexity": values,
        "change": {name: value / dense - 1 for name, value in values.items() if name != "dense"},
    }
    if cfg.json is not None:
        write_json(Path(cfg.json), result)
    _show(result)
    return result


def perplexities(
    model: PreTrainedModel, predictors: PredictorSet, data: list[TokenBatch]
) -> dict[str, float]:
    """All four perplexities; leaves the model rounded to f16 with plain ReLU."""
    values = {}
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    with bar("evaluate", len(MODES) * len(data)) as progress:
        values["dense"] = perplexity(model, data, lambda _: progress.advance())
        with exact_ffn(model):
            values["exact"] = perplexity(model, data, lambda _: progress.advance())
        with predicted_ffn(model, predictors):
            values["predicted"] = perplexity(model, data, lambda _: progress.advance())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
        if not activation_rule(model.config, "model").on_up:
            set_activation(model, ActivationRule("relu"))
        with predicted_ffn(model, predictors):
            values["bundle"] = perplexity(model, data, lambda _: progress.advance())
    return values


@contextmanager
def predicted_ffn(model: PreTrainedModel, predictors: PredictorSet) -> Iterator[None]:
    """Zero what the predictors do not predict, decided on the inputs PowerInfer would see."""
    family = family_of(model.config, "model")
    handles = []
    for layer, predictor in zip(family.decoder_layers(model), predictors.layers, strict=True):
        on_device = type(predictor)(*(w.to(model.device) for w in predictor))
        seen: list[Tensor] = []

        def on_norm(_: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen[:] = [args[0]]

        def on_down(
            _: nn.Module,
            args: tuple[Tensor, ...],
            seen: list[Tensor] = seen,
            predictor: Any = on_device,
        ) -> tuple[Tensor]:
            return (args[0] * (predictor.logits(seen[0]) >= predictors.threshold),)

        handles.append(family.norm(layer).register_forward_pre_hook(on_norm))
        handles.append(layer.get_submodule(family.down).register_forward_pre_hook(on_down))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def exact_ffn(model: PreTrainedModel) -> Iterator[None]:
    """Run every FFN sparsely: its first projection dense, the others only where it fired."""
    family = family_of(model.config, "model")
    layers = family.decoder_layers(model)
    rule = activation_rule(model.config, "model")
    if family.gate is None:
        blocks = [layer.get_submodule(family.down) for layer in layers]
        forwards = [_sparse_down(block) for block in blocks]
    else:
        parent = family.down.rpartition(".")[0]
        blocks = [layer.get_submodule(parent) for layer in layers]
        paths = (family.gate, family.up, family.down, family.act)
        forwards = [
            _sparse_ffn(*(layer.get_submodule(path) for path in paths), relu_up=rule.on_up)
            for layer in layers
        ]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block in blocks:
            del block.forward


def _sparse_down(down: Any) -> Callable[[Tensor], Tensor]:
    def forward(x1: Tensor) -> Tensor:
        x1_TF = x1.reshape(-1, x1.shape[-1]).float().to_sparse_csr()
        out_TD: Tensor = x1_TF @ down.weight.float().T
        if down.bias is not None:
            out_TD = out_TD + down.bias.float()
        return out_TD.to(x1.dtype).view(*x1.shape[:-1], -1)

    return forward


def _sparse_ffn(
    gate: Any, up: Any, down: Any, act: Any, *, relu_up: bool
) -> Callable[[Tensor], Tensor]:
    def product(like: Tensor, values: Tensor) -> Tensor:
        """A CSR matrix with the pattern of `like`."""
        return torch.sparse_csr_tensor(
            like.crow_indices(), like.col_indices(), values, like.shape, check_invariants=False
        )

    def forward(x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        fired = act(gate(x_TD)).float().to_sparse_csr()
        zeros = product(fired, torch.zeros_like(fired.values()))
        sampled = torch.sparse.sampled_addmm(zeros, x_TD.float(), up.weight.float().T)
        ups = sampled.values().relu() if relu_up else sampled.values()
        out_TD: Tensor = product(fired, fired.values() * ups) @ down.weight.float().T
        return out_TD.to(x_BSD.dtype).view(x_BSD.shape)

    return forward


def _show(result: dict[str, Any]) -> None:
    table = Table(title=f"perplexity on {result['tokens']:,} held-out tokens", title_justify="left")
    table.add_column("FFN")
    table.add_column("perplexity", justify="right")
    table.add_column("change", justify="right")
    for name, value in result["perplexity"].items():
        change = result["change"].get(name)
        table.add_row(name, f"{value:.4f}", "" if change is None else f"{change:+.2%}")
    console.print(table)
