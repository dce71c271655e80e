"""BitNet's linear layers: master weights that transformers rounds in every forward pass.

The checkpoints of BitNet b1.58 for training (those whose name ends in -bf16; arXiv 2504.12285) hold
bfloat16 weights and the `quantization_config` in `ONLINE`. transformers makes an AutoBitLinear of
every linear layer but the output matrix, which computes

    y = Q8(x) Q1.58(W)^T,    Q1.58(W) = s clamp(round(W / s), -1, 1),    s = mean |W| over W
                             Q8(x)    = t clamp(round(x / t), -128, 127),  t = max |x| / 127

with one t per token. Zeros stay zeros, so what is exact in a plain model is exact here. Other
quantized checkpoints, BitNet's packed ones included, are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sparsecast.core.errors import InputError, reason_of

ONLINE = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
}
_NONE = {"modules_to_not_convert": None, "use_rms_norm": False}
"""What save_pretrained adds to `ONLINE`, beside the epsilon of a norm that is not there."""


def check_quantization(config: PreTrainedConfig, folder: Path) -> None:
    """Refuse a quantized model, but for a BitNet that is rounded online.

    Raises:
        InputError: Says how it is quantized, and which model to give instead.
    """
    found = getattr(config, "quantization_config", None)
    if found is None or rounds_online(config):
        return
    kind, instead = found, "give the model they were made from"
    if isinstance(found, dict):
        kind = found.get("quant_method", "unnamed")
        if kind == "bitnet":
            kind = f"bitnet, {found.get('quantization_mode', 'offline')}"
            instead = "give the repository with the master weights, whose name ends in -bf16"
    raise InputError(
        f"{folder}: its weights are quantized ({kind}), expected float32, float16 or bfloat16; "
        f"{instead}"
    )


def rounds_online(config: PreTrainedConfig) -> bool:
    """Whether a config describes a BitNet with master weights, rounded in every forward pass."""
    found = getattr(config, "quantization_config", None)
    if config.model_type != "bitnet" or not isinstance(found, dict):
        return False
    stated = {name: value for name, value in found.items() if name != "rms_norm_eps"}
    return {**_NONE, **stated} == {**_NONE, **ONLINE}


def check_compiles(device: torch.device) -> None:
    """Round one row, so that a machine on which transformers cannot says so in one line.

    transformers compiles both roundings with torch.compile, which needs a C++ compiler.

    Raises:
        InputError: Compilation fails.
    """
    rounding = _roundings()
    try:
        for function in rounding:
            function.apply(torch.ones(2, 8, device=device))
    except Exception as error:  # torch's compilers fail in many ways
        raise InputError(
            f"BitNet: transformers compiles its rounding with torch.compile, which fails here "
            f"({reason_of(error)}); install a C++ compiler, such as g++"
        ) from error


def effective_weight(linear: nn.Linear) -> Tensor:
    """The weight that a linear layer multiplies by, (out, in): an AutoBitLinear's is rounded."""
    weight = linear.weight.detach()
    if not _is_rounding(linear):
        return weight
    rounded: Tensor = _roundings()[0].apply(weight)
    return rounded


def effective_input(linear: nn.Linear, x_TK: Tensor) -> Tensor:
    """What a linear layer multiplies its weight by: an AutoBitLinear rounds its input."""
    if not _is_rounding(linear):
        return x_TK
    rounded: Tensor = _roundings()[1].apply(x_TK)
    return rounded


def _is_rounding(linear: nn.Linear) -> bool:
    return bool(getattr(linear, "online_quant", False))


def _roundings() -> tuple[Any, Any]:
    """transformers' autograd functions for weights and for inputs."""
    # Here, because importing it starts torch's compiler: seconds that no other model needs.
    from transformers.integrations.bitnet import ActQuant, WeightQuant

    return WeightQuant, ActQuant
