"""LLaMA and Mistral in vLLM with ReLU, FATReLU, dReLU or ReLU², as config.json says.

vLLM's own `LlamaMLP` raises for any activation but SiLU. So a layer is built from a copy of the
config that says SiLU, and then gets its own activation. Everything else is vLLM's: attention,
weights, tensor and pipeline parallelism, quantization, LoRA. A model with SiLU is vLLM's alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM

from sparsecast.core.models.activations import ActivationRule
from sparsecast.integrations.vllm.ffn import SparseAndMul, by_rows, exact_or_dense
from sparsecast.integrations.vllm.served import (
    config_rule,
    served_rule,
    wanted_way,
    write_rule,
)
from sparsecast.kernels.in_models.sparse_ffn import runs_kernels
from sparsecast.kernels.ops.bitmask import MAX_WIDTH
from sparsecast.kernels.ops.launch import INTERPRETED

log = init_logger("vllm.sparsecast")
"""vLLM shows what is logged below its own name."""
HALVES = (torch.float16, torch.bfloat16)


class ExactMLP(nn.Module):
    """vLLM's MLP with the exact sparse FFN for up to 16 tokens; parameters keep their names."""

    def __init__(self, mlp: Any, rule: ActivationRule) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj
        self.rule = rule

    def transpose(self) -> None:
        """Lay the down projection out by neurons, in place; its shape and values stay.

        Weights that vLLM keeps elsewhere stay as they are, and the FFN dense.
        """
        weight = self.down_proj.weight
        if runs_kernels(weight):
            weight.data = by_rows(weight.data)

    def forward(self, x: Tensor) -> Tensor:
        y = exact_or_dense(
            x,
            self.gate_up_proj.weight,
            self.down_proj.weight,
            self.rule.name,
            self.rule.threshold,
        )
        if self.down_proj.reduce_results and self.down_proj.tp_size > 1:
            y = tensor_model_parallel_all_reduce(y)
        return y


def _hindrance(vllm_config: VllmConfig, mlp: Any) -> str | None:
    """Return why the kernels cannot compute this MLP; None if they can."""
    weight = getattr(mlp.down_proj, "weight", None)
    place = "cpu" if INTERPRETED else "cuda"
    device = torch.empty(0).device if weight is None else weight.device
    if envs.VLLM_BATCH_INVARIANT:
        return "sums of the kernels depend on the batch (VLLM_BATCH_INVARIANT)"
    if vllm_config.quant_config is not None:
        return "the model is quantized"
    if vllm_config.lora_config is not None:
        return "LoRA changes the weights"
    if device.type != place:
        return f"the weights are on {device.type}, and the kernels need {place}"
    if vllm_config.model_config.dtype not in HALVES:
        return f"the dtype is {vllm_config.model_config.dtype}, and the kernels need 16 bits"
    if mlp.down_proj.bias is not None or mlp.gate_up_proj.bias is not None:
        return "the FFN has biases"
    if mlp.down_proj.input_size_per_partition > MAX_WIDTH:
        return f"the FFN has more than {MAX_WIDTH:,} neurons"
    return None


def _finish(layer: Any, vllm_config: VllmConfig, rule: ActivationRule) -> None:
    """Give a layer that was built with SiLU its own FFN."""
    layer.mlp.act_fn = SparseAndMul(rule)
    if wanted_way(vllm_config.additional_config) != "exact":
        return
    if (why := _hindrance(vllm_config, layer.mlp)) is None:
        layer.mlp = ExactMLP(layer.mlp, rule)
    else:
        log.warning_once("sparse_ffn is exact, but FFNs stay dense: %s", why)


def _silu(config: Any) -> Any:
    """Return a copy of a config with the one activation that vLLM's layers take."""
    config = copy.copy(config)
    config.hidden_act = "silu"
    return config


class _SparseLayer:
    """What both layers do around vLLM's."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        super().__init__(  # type: ignore[call-arg]
            vllm_config=vllm_config, prefix=prefix, config=_silu(config)
        )
        rule = config_rule(config, prefix)
        assert rule is not None
        _finish(self, vllm_config, rule)


class _LlamaLayer(_SparseLayer, LlamaDecoderLayer):
    pass


class _MistralLayer(_SparseLayer, MistralDecoderLayer):
    pass


class _SparseModel:
    """What both models do around vLLM's."""

    _sparse: type[nn.Module]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        config, dtype = vllm_config.model_config.hf_config, vllm_config.model_config.dtype
        rule, warnings = served_rule(config, dtype)
        for warning in warnings:
            log.warning_once(warning)
        if rule is not None:
            write_rule(config, rule)
            options.setdefault("layer_type", self._sparse)
        super().__init__(  # type: ignore[call-arg]
            vllm_config=vllm_config, prefix=prefix, **options
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, ExactMLP):
                module.transpose()
        return loaded


class SparseLlamaForCausalLM(_SparseModel, LlamaForCausalLM):
    """vLLM's LLaMA, with SiLU or a sparse activation."""

    _sparse = _LlamaLayer


class SparseMistralForCausalLM(_SparseModel, MistralForCausalLM):
    """vLLM's Mistral, with SiLU or a sparse activation."""

    _sparse = _MistralLayer
