"""A ReLU llama as llama.cpp's `smallthinker` with one expert, or the reason why it is none.

llama.cpp's `llama` computes SiLU whatever a file says. Its SmallThinker computes, per layer,

    h = x + attention(rms_norm(x) * attn_norm)
    x = h + sum over the chosen experts e of  w_e * down_e(relu(gate_e(n)) * up_e(n)),
        n = rms_norm(h) * ffn_norm,  w = softmax(ffn_gate_inp x) over the chosen, divided by its sum

which with one expert, of which one is used, is a llama with ReLU: the softmax of one number is
exactly 1 whatever the router holds (zeros here, so that it is finite). What else decides:

- without `attention.sliding_window` every layer attends to all earlier tokens and rotates q and k
  (`n_no_rope_layer_step` equals the number of layers); with that key, every fourth does neither;
- halves of a head are rotated against each other (NEOX), as in transformers, so the rows of q and k
  keep their order, unlike in a file of the architecture `llama`;
- attention has `attention.head_count_kv` key/value heads and a head size of its own
  (`attention.key_length`, `attention.value_length`, `rope.dimension_count`);
- rope takes `rope.freq_base` and a linear `rope.scaling.factor`; frequencies per dimension (llama3,
  longrope) are never read;
- without `output.weight` the embedding is the output matrix;
- biases of o_proj and of the FFN are never loaded; those of q, k and v are, but no model here needs
  them.

(llama.cpp b11434: src/models/smallthinker.cpp, `build_moe_ffn` in src/llama-graph.cpp,
`load_hparams`, `create_tensor_qkv` and `llama_model_rope_type` in src/llama-model.cpp.)

Shape letters: V vocabulary, D hidden, A heads * head size, K key/value heads * head size, F FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, refuse_experts
from sparsecast.core.models.scales import Scales, scales_of
from sparsecast.export.write.hparams import check_shapes, read_rope

MODEL_TYPES = ("llama", "mistral", "granite")
"""transformers' names of what can be written; a MiniCPM is read as a granite."""


class Row(NamedTuple):
    """One tensor of the checkpoint and its place in the file."""

    target: str
    source: str
    shape: str
    """Shape of the source, in shape letters."""
    expert: bool = False
    """The file's tensor has one more dimension in front: of one expert."""


FIRST = (
    Row("token_embd.weight", "model.embed_tokens.weight", "VD"),
    Row("output_norm.weight", "model.norm.weight", "D"),
)
OUTPUT = Row("output.weight", "lm_head.weight", "VD")
LAYER = (
    Row("attn_norm", "input_layernorm", "D"),
    Row("attn_q", "self_attn.q_proj", "AD"),
    Row("attn_k", "self_attn.k_proj", "KD"),
    Row("attn_v", "self_attn.v_proj", "KD"),
    Row("attn_output", "self_attn.o_proj", "DA"),
    Row("ffn_norm", "post_attention_layernorm", "D"),
    Row("ffn_gate_exps", "mlp.gate_proj", "FD", True),
    Row("ffn_up_exps", "mlp.up_proj", "FD", True),
    Row("ffn_down_exps", "mlp.down_proj", "DF", True),
)


@dataclass(frozen=True, kw_only=True)
class ReLULlama:
    """The file's header, as far as it describes the model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    """Tokens up to which the file computes what the model does: its sliding window if that is
    shorter than its context."""
    window: int | None
    """That window."""
    eps: float
    rope_base: float
    rope_factor: float
    """Positions are divided by it; 1 leaves them as they are."""
    tied: bool
    """The model's output matrix is its embedding."""
    overridden: str | None
    """The config's activation, where --activation-threshold 0 takes another in its place."""
    scales: Scales | None
    """A Granite's or MiniCPM's, which become part of the file's weights."""

    def shape(self, letters: str) -> tuple[int, ...]:
        """Turn shape letters into sizes."""
        sizes = {
            "V": self.vocab,
            "D": self.hidden,
            "A": self.heads * self.head_dim,
            "K": self.kv_heads * self.head_dim,
            "F": self.ffn,
        }
        return tuple(sizes[letter] for letter in letters)

    def rows(self) -> Iterator[Row]:
        """Yield every tensor of the checkpoint that the file holds, in file order.

        An embedding that is tied in the model but has another scale than the head is written twice.
        """
        yield from FIRST
        if self.tied and self.scales is not None:
            yield OUTPUT._replace(source=FIRST[0].source)
        elif not self.tied:
            yield OUTPUT
        for i in range(self.layers):
            for row in LAYER:
                yield row._replace(
                    target=f"blk.{i}.{row.target}.weight",
                    source=f"model.layers.{i}.{row.source}.weight",
                )


def read_relu_llama(checkpoint: Checkpoint, threshold: float | None = None) -> ReLULlama:
    """Read a checkpoint's config; check it and the names and shapes of the tensors.

    Args:
        threshold: See `activation_rule`.

    Raises:
        InputError: Not a llama with ReLU, or an option of it that smallthinker does not have.
    """
    config: Any = checkpoint.config
    where = checkpoint.source
    refuse_experts(
        config,
        where,
        "--format gguf writes llamas with a dense FFN alone; collect, train, report and evaluate "
        "work",
    )
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            f"{where}: model_type is {config.model_type!r}, but --format gguf writes only models "
            f"of type {', '.join(MODEL_TYPES)}: llama.cpp's smallthinker computes no other; use "
            "the model in transformers, or llama.cpp's own converter if llama.cpp has its "
            "architecture"
        )
    overridden = _check_activation(config, where, threshold)
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise InputError(
                f"{where}: {field} is true, but llama.cpp's smallthinker has no biases; such a "
                "model cannot be written with --format gguf"
            )
    base, factor = read_rope(config, where, "llama.cpp's smallthinker")
    heads, context = config.num_attention_heads, config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    window = window if window is not None and window < context else None
    hparams = ReLULlama(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        context=window or context,
        window=window,
        eps=config.rms_norm_eps,
        rope_base=base,
        rope_factor=factor,
        tied=config.tie_word_embeddings,
        overridden=overridden,
        scales=scales_of(config),
    )
    _check_heads(hparams, where)
    checkpoint.check()
    shapes = {
        checkpoint.stored_name(row.source): hparams.shape(row.shape) for row in hparams.rows()
    }
    check_shapes(checkpoint, shapes, tied=hparams.tied, engine="llama.cpp's smallthinker")
    return hparams


def _check_activation(config: Any, where: str, threshold: float | None) -> str | None:
    """Refuse all but ReLU; return the config's FATReLU where the option 0 takes its place."""
    rule = activation_rule(config, where, threshold)
    if rule.threshold > 0:
        raise InputError(
            f"{where}: the activation is {rule}, but llama.cpp computes plain ReLU alone: what "
            f"lies between 0 and {rule.threshold:g} would count too; sparsify it with `--l1 0.1 "
            "--shift-tolerance 0`, or give --activation-threshold 0 to write it as the ReLU model "
            "that it is not (`sparsecast evaluate` with the same option says what that costs)"
        )
    if rule.on_up or rule.squared:
        name = "dReLU" if rule.on_up else "ReLU²"
        other = "export a bundle for PowerInfer" if rule.on_up else "use it in transformers"
        raise InputError(
            f"{where}: the activation is {name}, but llama.cpp's smallthinker computes ReLU on the "
            f"gate alone; such a model cannot be written with --format gguf: {other}"
        )
    own = getattr(config, "hidden_act_param", None)
    return f"fatrelu({own})" if config.hidden_act == "fatrelu" and own != 0 else None


def _check_heads(hparams: ReLULlama, where: str) -> None:
    if hparams.head_dim % 2 or hparams.heads % hparams.kv_heads:
        raise InputError(
            f"{where}: {hparams.heads} heads of size {hparams.head_dim} over {hparams.kv_heads} "
            "key/value heads; llama.cpp needs an even head size, and heads divisible by key/value "
            "heads"
        )
