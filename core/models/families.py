"""The submodules of every model family; the only place that knows module names.

Adding a family is adding a row to `FAMILIES`; a model that transformers has no class for also
needs a row in remote_configs.py. The predictor's input is taken where PowerInfer takes it (its
`llm_build_ffn_sparse` and the callers): for falcon the layer's own input, for all others the
residual stream after attention and before the FFN norm. Both are the input of the norm named here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.bitnet import effective_weight
from sparsecast.core.models.remote_configs import REMAPPED
from sparsecast.core.options import short_repr

RESIDUAL_BEFORE_FFN_NORM = "residual-before-ffn-norm"
LAYER_INPUT = "layer-input"
LARGEST_THRESHOLD = torch.finfo(torch.float32).max
"""Beyond it FATReLU's threshold is infinite, and nothing ever fires."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module paths; `norms` to `act` are relative to one decoder layer."""

    layers: str
    """The list of decoder layers, from the causal LM."""
    experts: str | None = None
    """The module of a layer that runs its experts, in a mixture of experts, as expert_loop.py wants
    it. `gate`, `up` and `down` are then the names of one expert's tensors in the file."""
    stored_experts: str = ""
    """The list of experts of a layer, as the file names it."""
    norms: tuple[str, ...]
    """The FFN norm, whose input is the predictor's input: the first of these that a layer has."""
    gate: str | None
    """None in an FFN of two matrices."""
    up: str
    down: str
    """The module whose input is x1, but for a family with `x1_norm`."""
    act: str
    """The activation module: behind the gate, or behind up where there is no gate."""
    act_key: str
    """The config field that names the activation."""
    x1_norm: str | None = None
    """An RMS norm between x1 and down; x1 is this norm's input then."""
    norm_offset: float = 0.0
    """The FFN norm of Nemotron and Gemma multiplies by its weight + 1."""
    convention: str
    """Name of the predictor's input in the manifests of activations and predictors."""

    @property
    def x1_reader(self) -> str:
        """The module whose input is x1."""
        return self.x1_norm or self.down

    @property
    def matrices(self) -> int:
        """Matrices of the FFN: m of the traffic formulas."""
        return 2 if self.gate is None else 3

    def decoder_layers(self, model: PreTrainedModel) -> list[nn.Module]:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return list(layers)

    def norm(self, layer: nn.Module) -> nn.Module:
        """Return the FFN norm of one decoder layer."""
        return layer.get_submodule(next(name for name in self.norms if hasattr(layer, name)))

    def norm_scale(self, layer: nn.Module) -> Tensor | None:
        """Return what the FFN norm multiplies by, (D,) float32; None if it has no weight."""
        weight: Tensor | None = getattr(self.norm(layer), "weight", None)
        return None if weight is None else weight.detach().float() + self.norm_offset

    def x1_gains(self, layer: nn.Module) -> Tensor:
        """Return (F,) float32: the norm of what neuron j adds to the residual stream, over |x1_j|.

        It is the Euclidean norm of down's column j; with `x1_norm` times |its weight j|, and only
        up to the division by the RMS of x1, which is one number for all neurons of a token. What
        follows down, such as Gemma 2's second norm, is not counted.
        """
        down = layer.get_submodule(self.down)
        assert isinstance(down, nn.Linear)
        gain_F: Tensor = torch.linalg.vector_norm(effective_weight(down).float(), dim=0)
        if self.x1_norm is not None:
            weight: Any = layer.get_submodule(self.x1_norm).weight
            gain_F = gain_F * weight.detach().float().abs()
        return gain_F

    def x1_norm_eps(self, layer: nn.Module) -> float | None:
        """Return what `x1_norm` adds to the mean square of x1; None without that norm."""
        if self.x1_norm is None:
            return None
        norm: Any = layer.get_submodule(self.x1_norm)
        return float(norm.variance_epsilon)


_LLAMA = Family(
    layers="model.layers",
    norms=("post_attention_layernorm",),
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    act="mlp.act_fn",
    act_key="hidden_act",
    convention=RESIDUAL_BEFORE_FFN_NORM,
)

_OPT = Family(
    layers="model.decoder.layers",
    norms=("final_layer_norm",),
    gate=None,
    up="fc1",
    down="fc2",
    act="activation_fn",
    act_key="activation_function",
    convention=RESIDUAL_BEFORE_FFN_NORM,
)

_FALCON = Family(
    layers="transformer.h",
    norms=("ln_mlp", "input_layernorm"),
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    act="mlp.act",
    act_key="activation",
    convention=LAYER_INPUT,
)

_TWO_MATRICES = replace(_LLAMA, gate=None)

_NANOCHAT = replace(_TWO_MATRICES, up="mlp.fc1", down="mlp.fc2", act="mlp.activation_fn")

_PERSIMMON = replace(_TWO_MATRICES, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", act="mlp.act")

_BITNET = replace(_LLAMA, x1_norm="mlp.ffn_sub_norm")

_GEMMA = replace(_LLAMA, norm_offset=1.0)

_GEMMA2 = replace(_GEMMA, norms=("pre_feedforward_layernorm",), act_key="hidden_activation")

_MIXTRAL = replace(
    _LLAMA,
    experts="mlp.experts",
    stored_experts="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
    act="mlp.experts.act_fn",
)

_SMALLTHINKER = replace(
    _MIXTRAL,
    experts="block_sparse_moe.experts",
    gate="gate",
    up="up",
    down="down",
    act="block_sparse_moe.experts.act_fn",
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "granite": _LLAMA,
    "ernie4_5": _LLAMA,
    "olmo": _LLAMA,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "opt": _OPT,
    "falcon": _FALCON,
    "arcee": _TWO_MATRICES,
    "nemotron": replace(_TWO_MATRICES, norm_offset=1.0),
    "jais2": _TWO_MATRICES,
    "nanochat": _NANOCHAT,
    "persimmon": _PERSIMMON,
    "bitnet": _BITNET,
    "mixtral": _MIXTRAL,
    "smallthinker": _SMALLTHINKER,
}


_FUSED = "gate and up are one matrix (gate_up_proj), and each must be a module of its own"
_NORM_BEHIND = (
    "its FFN norm is behind the FFN, so there is no residual before the norm for a predictor to "
    "read"
)
UNFIT = {
    "phi3": _FUSED,
    "glm": _FUSED,
    "glm4": _FUSED,
    "olmo2": _NORM_BEHIND,
    "olmo3": _NORM_BEHIND,
    "exaone4": _NORM_BEHIND,
}
"""Why some families that users ask for have no row, and a row would not do."""


def family_of(config: PreTrainedConfig, where: str) -> Family:
    """Return the family of a model; `where` names the model in the error."""
    if config.model_type not in FAMILIES:
        raise InputError(unknown_family_message(config.model_type, where))
    if config.model_type == "opt" and not config.do_layer_norm_before:
        raise InputError(
            f"{where}: this OPT has its FFN norm behind the FFN (do_layer_norm_before is false), "
            "so there is no residual before the norm for a predictor to read; use another OPT"
        )
    if config.model_type == "falcon" and not (
        config.parallel_attn or config.new_decoder_architecture
    ):
        raise InputError(
            f"{where}: this Falcon runs attention before the FFN (parallel_attn is false), which "
            "PowerInfer's Falcon does not; use one with parallel_attn, such as Falcon-7B or -40B"
        )
    return FAMILIES[config.model_type]


def refuse_experts(config: PreTrainedConfig, where: str, why: str) -> None:
    """Refuse a mixture of experts where only dense FFNs are supported.

    Args:
        why: What cannot be done with it, and what works instead.
    """
    if family_of(config, where).experts is not None:
        raise InputError(f"{where}: is a mixture of experts ({config.model_type}); {why}")


def unknown_family_message(model_type: object, where: str, *, brings_code: bool = False) -> str:
    """Build the error for a model of no known family."""
    if isinstance(model_type, str) and model_type in UNFIT:
        return f"{where}: model_type is {model_type!r}: {UNFIT[model_type]}; use another model"
    known = ", ".join(sorted({*FAMILIES, *REMAPPED}, key=str.lower))
    code = "; the code that comes with it (auto_map) is never run" if brings_code else ""
    return (
        f"{where}: model_type is {short_repr(model_type)}, expected one of {known}{code}; FAMILIES "
        "in sparsecast.core.models.families has the table, and adding a family is adding a row"
    )


def activation_rule(
    config: PreTrainedConfig, where: str, threshold: float | None = None
) -> ActivationRule:
    """Return the activation that a checkpoint's config states.

    Args:
        config: With an activation "relu", "relu2" or "drelu", or "fatrelu" and `hidden_act_param`
            as ProSparse writes.
        where: Names the model in the error.
        threshold: Overrides the config: FATReLU with this T, for a config that lost it.
    """
    family = family_of(config, where)
    name = getattr(config, family.act_key, None)
    if name not in ("relu", "fatrelu", "drelu", "relu2"):
        raise InputError(
            f"{where}: {family.act_key} is {short_repr(name)}, which leaves no exact zeros in the "
            "FFN; expected 'relu', 'relu2' or 'fatrelu'. `sparsecast sparsify` turns such a model "
            "into a sparse one (ReLU substitution, progressive L1 regularization, threshold shift)"
        )
    if threshold is not None:
        if name not in ("relu", "fatrelu") or not 0 <= threshold <= LARGEST_THRESHOLD:
            raise InputError(
                f"--activation-threshold: got {threshold} for {where}, expected a number from 0 to "
                f"{LARGEST_THRESHOLD:.3g} and a model with relu or fatrelu"
            )
        return ActivationRule("fatrelu", threshold)
    if name != "fatrelu":
        return ActivationRule(name)
    param = getattr(config, "hidden_act_param", None)
    number = isinstance(param, (int, float)) and not isinstance(param, bool)
    if param is None or not number or not 0 <= param <= LARGEST_THRESHOLD:
        raise InputError(
            f"{where}: {family.act_key} is 'fatrelu' but hidden_act_param is {str(param)[:40]!r}, "
            f"expected a number from 0 to {LARGEST_THRESHOLD:.3g}; give the threshold with "
            "--activation-threshold"
        )
    return ActivationRule("fatrelu", float(param))


def lost_threshold_warning(config: PreTrainedConfig, where: str) -> str | None:
    """Return a warning if a config says relu but other fields show that it was FATReLU.

    MiniCPM-S in LLaMA format still lists MiniCPM's scales, and the conversion dropped 0.03.
    """
    if getattr(config, "hidden_act", None) != "relu" or not hasattr(config, "scale_emb"):
        return None
    return (
        f"{where}: hidden_act is 'relu' beside fields of MiniCPM (scale_emb); the conversion to "
        "LLaMA format loses FATReLU's threshold. MiniCPM-S-1B has 0.03: give it with "
        "--activation-threshold 0.03"
    )
