"""The hyperparameters of PowerInfer's file, read from a model's config and checked.

The engine loads many models without complaint and computes something else, or fails with
"basic_string: construction from null is not valid". Such models are refused here, with the reason.
(PowerInfer's llama.cpp at d3ebd7c: `llm_load_hparams`, `build_llama_variants`, `build_falcon`,
`build_opt`.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.bitnet import rounds_online
from sparsecast.core.models.checkpoint import Checkpoint, check_tied_head
from sparsecast.core.models.families import activation_rule, family_of, refuse_experts
from sparsecast.core.models.scales import Scales, scales_of
from sparsecast.core.models.shape import ModelShape
from sparsecast.export.write.tensor_map import model_rows

SMALLEST_FFN = 1001
"""Up to 1000 neurons the engine uses a kernel that ignores the threshold."""
OPT_POSITIONS = 2048
"""The engine's OPT always has 2050 position rows, two of them for padding."""
REASONS = {
    "qwen2": "its attention has biases, which the engine's llama has no place for",
    "qwen3": "it normalizes q and k, which the engine's llama does not",
}
"""Families with ReLU that collect and train support, but that the engine cannot run."""
NO_SQUARE = (
    "ReLU², but the engine's FFN computes ReLU alone and stops at anything else "
    "(llm_build_ffn_sparse), so such a model cannot be exported; it works with collect, train, "
    "report and evaluate"
)


@dataclass(frozen=True, kw_only=True)
class HParams:
    """The file's header, as far as it describes the model."""

    arch: str
    """One of `tensor_map.ARCHITECTURES`."""
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    eps: float
    """Epsilon of every norm. The engine's opt does not read it and takes 0."""
    rope_base: float = 10_000.0
    rope_factor: float = 1.0
    """Linear position interpolation divides positions by this factor; 1 leaves them as they are."""
    window: int | None = None
    """Length of the model's sliding attention window. The engine attends to all tokens."""
    norms: int = 2
    """Norms of a layer."""
    tied: bool
    activation: ActivationRule
    """The model's own activation; the engine computes ReLU."""
    scales: Scales | None = dataclasses.field(default=None, repr=False)
    """A Granite's or MiniCPM's, which become part of the file's weights."""

    @property
    def model_shape(self) -> ModelShape:
        return ModelShape(
            layers=self.layers,
            hidden_size=self.hidden,
            ffn_width=self.ffn,
            ffn_matrices=3 if self.gated else 2,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return self.arch in ("llama", "bamboo")

    @property
    def rms_norm(self) -> bool:
        """Whether norms are RMS norms, which have no bias. The others are LayerNorms with one."""
        return self.arch in ("llama", "bamboo")

    @property
    def rotary(self) -> bool:
        """Whether positions rotate q and k. An OPT adds a position embedding instead."""
        return self.arch != "opt"

    def shape(self, letters: str) -> tuple[int, ...]:
        """Turn the shape letters of tensor_map.py into sizes."""
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


def read_hparams(checkpoint: Checkpoint, activation_threshold: float | None = None) -> HParams:
    """Read a checkpoint's config; check it and the names and shapes of the tensors.

    Args:
        activation_threshold: See `activation_rule`.

    Raises:
        InputError: An architecture or option that PowerInfer does not support.
    """
    config: Any = checkpoint.config
    where = checkpoint.source
    family = family_of(config, where)
    refuse_experts(
        config,
        where,
        "PowerInfer's engine has dense FFNs alone, so there is no bundle of it; collect, train, "
        "report and evaluate work",
    )
    if config.model_type in REASONS:
        raise InputError(
            f"{where}: model_type is {config.model_type!r}: {REASONS[config.model_type]}"
        )
    rule = activation_rule(config, where, activation_threshold)
    if rule.squared:
        kernels = "" if rounds_online(config) else ", and in sparsify_model"
        raise InputError(f"{where}: {family.act_key} is {rule.name!r}: {NO_SQUARE}{kernels}")
    readers = {
        "llama": _llama,
        "mistral": _llama,
        "granite": _llama,
        "falcon": _falcon,
        "opt": _opt,
    }
    if (read := readers.get(config.model_type)) is None:
        raise InputError(
            f"{where}: model_type is {config.model_type!r}, but the engine computes only models "
            f"of type {', '.join(readers)}; such a model cannot be exported"
        )
    hparams = read(config, rule, where)
    check_shape(hparams, getattr(config, "head_dim", None), where)
    checkpoint.check()
    check_tensors(checkpoint, hparams)
    return hparams


def _llama(config: Any, rule: ActivationRule, where: str) -> HParams:
    """Read a Llama, Mistral or Granite; with ReLU on gate and up it is the engine's bamboo."""
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise InputError(
                f"{where}: {field} is true, but the engine's llama has no biases; such a model "
                "cannot be exported"
            )
    base, factor = read_rope(config, where)
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    return HParams(
        arch="bamboo" if rule.on_up else "llama",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        vocab=config.vocab_size,
        context=context,
        eps=config.rms_norm_eps,
        rope_base=base,
        rope_factor=factor,
        window=window if window is not None and window < context else None,
        tied=config.tie_word_embeddings,
        activation=rule,
        scales=scales_of(config),
    )


def _falcon(config: Any, rule: ActivationRule, where: str) -> HParams:
    if config.alibi or config.bias:
        found = "alibi" if config.alibi else "bias"
        raise InputError(
            f"{where}: {found} is true, but the engine's falcon rotates q and k by position and "
            "has no biases except in norms; such a model cannot be exported"
        )
    base, factor = read_rope(config, where)
    if factor != 1.0:
        raise InputError(
            f"{where}: rope type is 'linear', but the engine's falcon divides positions by the "
            "factor twice; such a model cannot be exported"
        )
    grouped = config.new_decoder_architecture
    ungrouped = 1 if config.multi_query else config.num_attention_heads
    norms = config.num_ln_in_parallel_attn or 2
    return HParams(
        arch="falcon",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_kv_heads if grouped else ungrouped,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        eps=config.layer_norm_epsilon,
        rope_base=base,
        norms=norms if grouped else 1,
        tied=config.tie_word_embeddings,
        activation=rule,
    )


def _opt(config: Any, rule: ActivationRule, where: str) -> HParams:
    wanted = {
        "max_position_embeddings": OPT_POSITIONS,
        "word_embed_proj_dim": config.hidden_size,
        "tie_word_embeddings": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    }
    for field, want in wanted.items():
        if (value := getattr(config, field, want)) != want:
            raise InputError(
                f"{where}: {field} is {value}, but the engine's opt supports only {want}; such a "
                "model cannot be exported"
            )
    return HParams(
        arch="opt",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_dim,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        vocab=config.vocab_size,
        context=OPT_POSITIONS,
        eps=1e-5,  # torch's own, the config has no field
        tied=True,
        activation=rule,
    )


def read_rope(config: Any, where: str, engine: str = "the engine") -> tuple[float, float]:
    """Read (base, linear factor) from transformers 5's rope_parameters or the older fields.

    Raises:
        InputError: Another kind of rope, which `engine` does not compute.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    base = rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear"):
        raise InputError(
            f"{where}: rope type is {kind!r}, but {engine} supports only 'default' and "
            "'linear'; export a model with one of these"
        )
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(
            f"{where}: rope rotates {part:g} of each head, but {engine} rotates whole heads; "
            "such a model cannot be exported"
        )
    return float(base), float(rope.get("factor", 1.0)) if kind == "linear" else 1.0


def check_shape(hparams: HParams, head_dim: int | None, where: str) -> None:
    """Refuse sizes that the engine would compute wrongly.

    Args:
        head_dim: The config's, or None.
    """
    if hparams.hidden % hparams.heads or (head_dim or hparams.head_dim) != hparams.head_dim:
        raise InputError(
            f"{where}: head_dim is {head_dim}, but the engine uses hidden size / heads = "
            f"{hparams.hidden / hparams.heads:g} for every model; such a model cannot be exported"
        )
    if hparams.head_dim % 2 or hparams.heads % hparams.kv_heads:
        raise InputError(
            f"{where}: {hparams.heads} heads of size {hparams.head_dim} over {hparams.kv_heads} "
            "key/value heads; the engine needs an even head size, and heads divisible by key/value "
            "heads"
        )
    if hparams.ffn < SMALLEST_FFN:
        raise InputError(
            f"{where}: the FFN is {hparams.ffn} wide, expected more than 1000; for fewer, the "
            "engine uses a kernel that ignores the threshold and drops blocks of 128 neurons"
        )


def check_tensors(checkpoint: Checkpoint, hparams: HParams) -> None:
    """Refuse a checkpoint that lacks a tensor of the architecture or has an extra one."""
    rows = model_rows(hparams.arch, hparams.layers, tied=hparams.tied, norms=hparams.norms)
    shapes = {checkpoint.stored_name(row.source): hparams.shape(row.shape) for row in rows}
    engine = f"the engine's {hparams.arch}"
    check_shapes(checkpoint, shapes, tied=hparams.tied, engine=engine)


def check_shapes(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], *, tied: bool, engine: str
) -> None:
    """Refuse a checkpoint whose tensors are not exactly these.

    Args:
        shapes: By stored name, the embedding first.
        tied: Whether the output matrix is the embedding; `shapes` then has none.
        engine: What computes the file, in errors.
    """
    missing = set(shapes)
    for name, tensor in checkpoint.tensors():
        # Buffers of old versions, a second copy of the embedding, TurboSparse's own predictors.
        if name.endswith((".rotary_emb.inv_freq", ".attention.masked_bias")):
            continue
        if ".predictor." in name:
            continue
        if tied and name == "lm_head.weight":
            check_tied_head(checkpoint, tensor, next(iter(shapes)))
            continue
        if name not in shapes:
            kind = "bias there" if name.endswith(".bias") else "tensor of that name"
            raise InputError(
                f"{checkpoint.folder}: holds {name}, but {engine} has no {kind}; such a model "
                "cannot be exported"
            )
        missing.discard(name)
        if tuple(tensor.shape) != (want := shapes[name]):
            raise InputError(
                f"{checkpoint.folder}: {name} is {tuple(tensor.shape)}, config.json implies "
                f"{want}; save the model again with its own config"
            )
    if missing:
        raise InputError(
            f"{checkpoint.folder}: tensor {min(missing)} is missing; the checkpoint is incomplete"
        )
