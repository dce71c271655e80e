"""A llama's hyperparameters, and the refusal of what PowerInfer's engine cannot express.

The engine loads many of these without a word and computes something else, or fails to load with
"basic_string: construction from null is not valid", so they are refused here, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsecast.collect.activations import ActivationRule
from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.errors import InputError
from sparsecast.collect.families import activation_rule
from sparsecast.export.names import llama_rows

SMALLEST_FFN = 1001
"""At 1000 neurons or fewer the engine takes a kernel that ignores the threshold."""


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What the file's header says about the model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    rms_eps: float
    rope_base: float
    rope_factor: float
    """Linear position interpolation: positions are divided by it; 1 is none."""
    tied: bool
    activation: ActivationRule
    """The model's own; the engine computes ReLU."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def shape(self, letters: str) -> tuple[int, ...]:
        """Shape letters of `names.py` to sizes."""
        kv_width = self.kv_heads * self.head_dim
        sizes = {"V": self.vocab, "D": self.hidden, "K": kv_width, "F": self.ffn}
        return tuple(sizes[letter] for letter in letters)


def read_hyper(checkpoint: Checkpoint) -> Hyper:
    """Read and check a checkpoint's config and its tensors' names and shapes.

    Raises:
        InputError: Not a llama, or one that the engine cannot express.
    """
    config: Any = checkpoint.config
    where = checkpoint.source
    if config.model_type != "llama":
        raise InputError(
            f"{where}: model_type is {config.model_type!r}, expected 'llama'; export writes no "
            "other architecture of PowerInfer's yet"
        )
    rope_base, rope_factor = _rope(config, where)
    hyper = Hyper(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        rms_eps=config.rms_norm_eps,
        rope_base=rope_base,
        rope_factor=rope_factor,
        tied=config.tie_word_embeddings,
        activation=activation_rule(config, where),
    )
    _check_shape(hyper, config.head_dim, where)
    _check_tensors(checkpoint, hyper)
    return hyper


def _rope(config: Any, where: str) -> tuple[float, float]:
    """(base, linear factor) from transformers 5's rope_parameters or the older spelling."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    base = rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear"):
        raise InputError(
            f"{where}: rope type is {kind!r}, but the engine computes only 'default' and 'linear' "
            "as this model means them; a model with plain positions can be exported"
        )
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(
            f"{where}: rope turns {part:g} of each head, but the engine turns whole heads of a "
            "llama; such a model cannot be exported"
        )
    return float(base), float(rope.get("factor", 1.0)) if kind == "linear" else 1.0


def _check_shape(hyper: Hyper, head_dim: int | None, where: str) -> None:
    if hyper.hidden % hyper.heads or (head_dim or hyper.head_dim) != hyper.head_dim:
        raise InputError(
            f"{where}: head_dim is {head_dim}, but the engine takes hidden size / heads = "
            f"{hyper.hidden / hyper.heads:g} for every llama; such a model cannot be exported"
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


def _check_tensors(checkpoint: Checkpoint, hyper: Hyper) -> None:
    rows = {row.source: row for row in llama_rows(hyper.layers, hyper.tied)}
    missing = set(rows)
    for name, tensor in checkpoint.tensors():
        if name.endswith("rotary_emb.inv_freq") or (hyper.tied and name == "lm_head.weight"):
            continue
        if name not in rows:
            kind = "biases" if name.endswith(".bias") else "tensor of that name"
            raise InputError(
                f"{checkpoint.folder}: holds {name}, but the engine's llama knows no {kind}; such "
                "a model cannot be exported"
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
