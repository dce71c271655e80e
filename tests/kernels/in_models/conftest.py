"""Small models of every family with random weights, in memory, and random predictors for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Jais2Config,
    Jais2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
)

from sparsecast.core.models.families import activation_rule
from sparsecast.core.models.loading import set_activation
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.predictor import Predictor

LAYERS, HIDDEN, FFN, RANK, VOCAB = 2, 64, 88, 32, 128
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {
    **COMMON,
    "intermediate_size": FFN,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
FALCON = {
    **COMMON,
    "ffn_hidden_size": FFN,
    "activation": "relu",
    "initializer_range": 0.2,
    "alibi": False,
}
OPT = {
    **COMMON,
    "ffn_dim": FFN,
    "word_embed_proj_dim": HIDDEN,
    "init_std": 0.2,
    "activation_function": "relu",
}
FATRELU = {**GATED, "hidden_act": "fatrelu", "hidden_act_param": 0.3}
RELU2 = {**GATED, "hidden_act": "relu2"}
NO_GROUPS = {**COMMON, "intermediate_size": FFN, "initializer_range": 0.2, "hidden_act": "relu2"}
ZOO = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED, hidden_act="relu")),
    "prosparse": lambda: LlamaForCausalLM(LlamaConfig(**FATRELU)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**FATRELU)),
    "bamboo": lambda: MistralForCausalLM(MistralConfig(**GATED, hidden_act="drelu")),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GATED, head_dim=16, query_pre_attn_scalar=16, hidden_activation="relu")
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "falcon-7b": lambda: FalconForCausalLM(FalconConfig(**FALCON, bias=False)),
    "falcon-40b": lambda: FalconForCausalLM(
        FalconConfig(**FALCON, bias=True, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "arcee": lambda: ArceeForCausalLM(ArceeConfig(**RELU2)),
    "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**RELU2)),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**RELU2)),
    "jais2": lambda: Jais2ForCausalLM(Jais2Config(**RELU2, mlp_bias=True)),
    "persimmon": lambda: PersimmonForCausalLM(PersimmonConfig(**NO_GROUPS)),
    "bitnet": lambda: BitNetForCausalLM(BitNetConfig(**RELU2, rms_norm_eps=0.5)),
}
"""One norm or two, two matrices or three, biases, and where the parts of the FFN stand. BitNet's
epsilon is large enough to count in the norm between x1 and down."""


@pytest.fixture(autouse=True)
def _banded_memory():
    """Not here: bands would count as the model's memory."""


@pytest.fixture
def make():
    """A model of the zoo, the same every time."""

    def model(name: str, dtype: torch.dtype = torch.float32):
        torch.manual_seed(3)
        made = ZOO[name]()
        for key, weight in made.named_parameters():
            if key.endswith("bias"):
                nn.init.uniform_(weight, -0.3, 0.3)
            elif "norm" in key or ".ln_" in key:
                nn.init.uniform_(weight, 0.5, 1.5)
        set_activation(made, activation_rule(made.config, name))
        return made.to(dtype).eval()

    return model


@pytest.fixture
def predictors(manifest_of):
    """Random ones that predict about half; with a manifest where calibrations are given."""

    def make(dtype: str = "f16", calibration=None, threshold: float = 0.0) -> PredictorSet:
        generator = torch.Generator().manual_seed(7)
        layers = [
            Predictor(
                torch.randn(RANK, HIDDEN, generator=generator) * 0.1,
                torch.randn(FFN, RANK, generator=generator),
                dtype,
            ).stored()
            for _ in range(LAYERS)
        ]
        if calibration is None:
            return PredictorSet(layers, threshold, None)
        relu = {"activation": "relu", "activation_threshold": 0.0}
        manifest = manifest_of(layers, calibration=calibration, **relu)
        return PredictorSet(layers, threshold, manifest)

    return make


@pytest.fixture
def ids():
    def make(*shape: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))

    return make


@pytest.fixture
def logits():
    """Compute a model's logits in float32, without gradients or cache."""

    def run(model, ids_BS: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids_BS, use_cache=False).logits.float()

    return run


@pytest.fixture
def near():
    """max |got - want| / max |want| within a bound; NaN never is."""

    def check(got: torch.Tensor, want: torch.Tensor, bound: float = 2e-6) -> None:
        error = float((got - want).abs().max() / want.abs().max())
        assert error <= bound, error

    return check
