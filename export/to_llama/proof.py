"""Prove that a converted LLaMA computes what the model does.

Every folded tensor must be the model's times its factor, rounded once; every other one equal. Then
the logits of both forms are compared on the same tokens, in float64:

    apart   the LLaMA and the model with its own run-time scales, of weights that are the LLaMA's
            divided by their factors: the same rounded numbers on both sides. What is left is the
            order of operations, 1e-9 of the largest logit or less; a wrong or missing scale is
            thousands of times the bound.
    moved   the LLaMA and the model as it is: what rounding the products to the stored dtype costs,
            which no conversion avoids. It is reported.

float64, because FATReLU jumps at its threshold: in float32 some neuron of a large model lies so
close that noise turns it over.

Memory: a slab of weights in float64, the activations of a few hundred tokens, and the logits of
two forms. The models are never built: each matrix is read when its module runs (`streamed_logits`).

Shape letters: N documents, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import set_activation
from sparsecast.core.models.pretrained import empty_model
from sparsecast.export.to_llama.plan import ConvertPlan, FoldedTensor
from sparsecast.export.to_llama.weights import split_rows

BOUND = 1e-4
"""Largest `apart`, relative to the largest logit."""
PASSES = 4
"""How often the proof reads the weights."""
Read = Callable[[str], Iterator[Tensor]]
"""A tensor's name to its rows, slab by slab, in float64."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was compared, and how near the forms are; differences relative to the largest logit."""

    documents: int
    tokens: int
    apart: float
    moved: float
    changed: int
    """Tokens after which the likeliest next token is another one."""


def prove(
    plan: ConvertPlan,
    written: Checkpoint,
    rule: ActivationRule | None,
    docs: Sequence[list[int]],
    read: Callable[[int], Any] = lambda nbytes: None,
) -> Proof:
    """Compare the written folder with the model.

    Args:
        written: The folder, as every stage opens it.
        rule: The activation that its config states.
        docs: Token ids of a few documents, BOS included.
        read: Called with bytes of weights, `PASSES` times those of the model in all.

    Raises:
        InputError: All logits are 0.
        RuntimeError: They are not the same.
    """
    check_values(plan, written, read)
    ids_NS, keep_NS = _padded(docs)
    by_name = {tensor.name: tensor for tensor in plan.tensors}

    def of_llama(divided: bool, name: str) -> Iterator[Tensor]:
        factor = by_name[name].factor if divided else 1.0
        for rows in split_rows(written.tensor(name)):
            read(rows.nbytes)
            yield rows.double() / factor

    def of_model(name: str) -> Iterator[Tensor]:
        for rows in split_rows(plan.checkpoint.tensor(by_name[name].source)):
            read(rows.nbytes)
            yield rows.double()

    def logits(config: PreTrainedConfig, of: Read, rule: ActivationRule | None) -> Tensor:
        return streamed_logits(config, rule, of, ids_NS)[keep_NS]

    model = plan.checkpoint.config
    llama_TV = logits(written.config, partial(of_llama, False), rule)
    if not (largest := float(llama_TV.abs().max())):
        raise InputError(
            f"{plan.checkpoint.folder}: all logits are 0, so nothing can be proved; expected the "
            "weights of a trained model: download or save them again"
        )
    scaled_TV = logits(model, partial(of_llama, True), plan.rule)
    apart = _largest_difference(scaled_TV, llama_TV) / largest
    if not apart <= BOUND:
        raise RuntimeError(
            f"the written LLaMA does not compute what the model does: logits of {len(llama_TV)} "
            f"tokens differ by up to {apart:.2g} of the largest, allowed are {BOUND:g}"
        )
    del scaled_TV
    own_TV = logits(model, of_model, plan.rule)
    return Proof(
        documents=len(docs),
        tokens=len(llama_TV),
        apart=apart,
        moved=_largest_difference(own_TV, llama_TV) / largest,
        changed=int((own_TV.argmax(-1) != llama_TV.argmax(-1)).sum()),
    )


def _largest_difference(a_TV: Tensor, b_TV: Tensor) -> float:
    """Return the largest absolute difference, a row at a time; NaN where there is one."""
    rows = zip(a_TV, b_TV, strict=True)
    return float(torch.stack([(a_V - b_V).abs().max() for a_V, b_V in rows]).max())


def check_values(plan: ConvertPlan, written: Checkpoint, read: Callable[[int], Any]) -> None:
    """Check that every tensor is the model's times its factor, rounded once to its dtype.

    Raises:
        RuntimeError: One is not.
    """
    for tensor in plan.tensors:
        found = written.tensor(tensor.name)
        if found.dtype != tensor.dtype or tuple(found.shape) != tensor.shape:
            raise RuntimeError(f"{tensor.name} was written as {found.dtype} {tuple(found.shape)}")
        pairs = zip(
            split_rows(found), split_rows(plan.checkpoint.tensor(tensor.source)), strict=True
        )
        for got, rows in pairs:
            if not _is_rounded(got, rows, tensor):
                raise RuntimeError(
                    f"{tensor.name} is not the model's times {tensor.factor:g} in the written file"
                )
            read(got.nbytes)


def _is_rounded(got: Tensor, rows: Tensor, tensor: FoldedTensor) -> bool:
    if tensor.factor == 1.0:
        return torch.equal(got, rows)
    kind = torch.finfo(tensor.dtype)
    want = rows.double() * tensor.factor
    # Half a unit in the last place; rounding to float32 before adds a little to that.
    bound = want.abs() * (kind.eps / 2 * 1.001) + kind.smallest_normal * kind.eps
    return bool(((got.double() - want).abs() <= bound).all())


def _padded(docs: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Return (N, S) ids, padded on the right, and which of them are tokens."""
    length = max(map(len, docs))
    ids_NS = torch.tensor([ids + [0] * (length - len(ids)) for ids in docs])
    keep_NS = torch.tensor([[True] * len(ids) + [False] * (length - len(ids)) for ids in docs])
    return ids_NS, keep_NS


@torch.inference_mode()
def streamed_logits(
    config: PreTrainedConfig, rule: ActivationRule | None, of: Read, ids_NS: Tensor
) -> Tensor:
    """Compute a Llama's or Granite's (N, S, V) float64 logits without its weights in memory."""
    model: Any = empty_model(config)
    model.eval()
    if rule is not None:
        set_activation(model, rule)
    for name, module in model.named_modules():
        kind = type(module)
        if kind is nn.Linear:
            width, biased = module.out_features, module.bias is not None
            module.forward = partial(_linear, of, name, width, biased)
        elif kind is nn.Embedding:
            module.forward = partial(_embedding, of, name)
        elif [*module.parameters(recurse=False)]:  # a norm
            module.weight = nn.Parameter(torch.cat([*of(f"{name}.weight")]), requires_grad=False)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)  # buffers with values
    logits_NSV: Tensor = model(ids_NS, use_cache=False).logits
    return logits_NSV


def _linear(of: Read, name: str, width: int, biased: bool, x: Tensor) -> Tensor:
    y, start = x.new_empty(*x.shape[:-1], width), 0
    for rows in of(f"{name}.weight"):
        y[..., start : start + len(rows)] = x @ rows.T
        start += len(rows)
    return y + torch.cat([*of(f"{name}.bias")]) if biased else y


def _embedding(of: Read, name: str, ids: Tensor) -> Tensor:
    """Gather the rows of `ids` from the slabs that hold them."""
    found: Tensor | None = None
    start = 0
    for rows in of(f"{name}.weight"):
        here = (ids >= start) & (ids < start + len(rows))
        if found is None:
            found = rows.new_zeros(*ids.shape, rows.shape[1])
        found[here] = rows[ids[here] - start]
        start += len(rows)
    assert found is not None
    return found
