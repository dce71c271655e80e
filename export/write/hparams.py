"""What the header of PowerInfer's file says about a model, checked against the model's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.shape import ModelShape
from sparsecast.export.write.tensor_map import model_rows

SMALLEST_FFN = 1001
"""At 1000 neurons or fewer the engine takes a kernel that ignores the threshold."""


@dataclass(frozen=True, kw_only=True)
class HParams:
    """What the file's header says about the model."""

    arch: str
    """One of `names.ARCHITECTURES`."""
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    eps: float
    """Of every norm; the engine's opt does not read it and takes 0."""
    rope_base: float = 10_000.0
    rope_factor: float = 1.0
    """Linear position interpolation: positions are divided by it; 1 is none."""
    window: int | None = None
    """Tokens back that the model attends to; the engine attends to all."""
    norms: int = 2
    """Of a layer."""
    tied: bool
    activation: ActivationRule
    """The model's own; the engine computes ReLU."""

    @property
    def model_shape(self) -> ModelShape:
        return ModelShape(
            layers=self.layers,
            hidden_size=self.hidden,
            ffn_width=self.ffn,
            ffn_matrices=3 if self.arch in ("llama", "bamboo") else 2,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def rms_norm(self) -> bool:
        """Norms divide by the root mean square, without a bias; others are LayerNorms with one."""
        return self.arch in ("llama", "bamboo")

    @property
    def rotates(self) -> bool:
        """Positions turn q and k; an OPT adds an embedding of them instead."""
        return self.arch != "opt"

    def shape(self, letters: str) -> tuple[int, ...]:
        """Shape letters of `names.py` to sizes."""
        kv_width = self.kv_heads * self.head_dim
        sizes = {
            "V": self.vocab,
            "P": self.context + 2,  # an OPT's first two rows are for padding
            "D": self.hidden,
            "K": kv_width,
            "Q": self.hidden + 2 * kv_width,
            "F": self.ffn,
        }
        return tuple(sizes[letter] for letter in letters)


def check_shape(hyper: HParams, head_dim: int | None, where: str) -> None:
    """Refuse sizes that the engine computes otherwise.

    Args:
        head_dim: As the config has it.
    """
    if hyper.hidden % hyper.heads or (head_dim or hyper.head_dim) != hyper.head_dim:
        raise InputError(
            f"{where}: head_dim is {head_dim}, but the engine takes hidden size / heads = "
            f"{hyper.hidden / hyper.heads:g} for every model; such a model cannot be exported"
        )
    if hyper.head_dim % 2 or hyper.heads % hyper.kv_heads:
        raise InputError(
            f"{where}: {hyper.heads} heads of size {hyper.head_dim} over {hyper.kv_heads} "
            "key/value heads; the engine wants an even head size, and heads divisible by key/value "
            "heads"
        )
    if hyper.ffn < SMALLEST_FFN:
        raise InputError(
            f"{where}: the FFN is {hyper.ffn} wide, expected more than 1000; below, the engine "
            "takes a kernel that ignores the threshold and drops blocks of 128 neurons"
        )


def check_tensors(checkpoint: Checkpoint, hyper: HParams) -> None:
    """Refuse a checkpoint that lacks a tensor of the architecture, or has one more."""
    rows = {
        checkpoint.stored_name(row.source): row
        for row in model_rows(hyper.arch, hyper.layers, tied=hyper.tied, norms=hyper.norms)
    }
    missing = set(rows)
    for name, tensor in checkpoint.tensors():
        # Buffers of old versions, a second copy of the embedding, TurboSparse's own predictors.
        if name.endswith((".rotary_emb.inv_freq", ".attention.masked_bias")):
            continue
        if ".predictor." in name:
            continue
        if hyper.tied and name == "lm_head.weight":
            _check_tied(checkpoint, tensor, next(iter(rows)))
            continue
        if name not in rows:
            kind = "biases there" if name.endswith(".bias") else "tensor of that name"
            raise InputError(
                f"{checkpoint.folder}: holds {name}, but the engine's {hyper.arch} knows no "
                f"{kind}; such a model cannot be exported"
            )
        missing.discard(name)
        want = hyper.shape(rows[name].shape)
        if tuple(tensor.shape) != want:
            raise InputError(
                f"{checkpoint.folder}: {name} is {tuple(tensor.shape)}, config.json makes it "
                f"{want}; save the model again with its own config"
            )
    if missing:
        raise InputError(
            f"{checkpoint.folder}: tensor {min(missing)} is missing; the checkpoint is incomplete"
        )


def _check_tied(checkpoint: Checkpoint, output: Tensor, embedding: str) -> None:
    """Refuse an output matrix of its own under a config that ties it: transformers runs such a
    model untied, with a warning."""
    shared = checkpoint.tensor(embedding)
    if not torch.equal(output.to(shared.dtype), shared):
        raise InputError(
            f"{checkpoint.folder}: lm_head.weight is not {embedding}, but config.json ties the two "
            "(tie_word_embeddings, which falcon and opt have unless told otherwise); set it to "
            "false there, or leave out lm_head.weight"
        )
