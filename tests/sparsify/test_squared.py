"""Models that sparsify does not train, and where x1 is read in those with a norm behind it."""

from __future__ import annotations

import pytest
import torch
from transformers import BitNetConfig, BitNetForCausalLM

from sparsecast.core.errors import InputError
from sparsecast.sparsify.run import sparsify
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule

BITNET = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("family", "field"), [("llama", "hidden_act"), ("opt", "activation_function")]
)
def test_a_model_with_squared_relu_is_sparse_already(family, field, dense, options, tmp_path):
    source = dense(family, "relu2")
    with pytest.raises(InputError, match=f"{field} is 'relu2', which is sparse already"):
        sparsify(options(model=str(source)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


def test_weights_that_are_rounded_in_the_forward_pass_are_not_trained(dense, options, tmp_path):
    online = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    }
    source = dense()  # for its tokenizer
    config = BitNetConfig(**BITNET, hidden_act="silu")
    model = BitNetForCausalLM(config)
    model.config.quantization_config = online
    model.save_pretrained(source)
    with pytest.raises(InputError, match="rounded in every forward pass"):
        sparsify(options(model=str(source)))


def test_the_l1_term_is_on_x1_in_front_of_its_norm():
    model = BitNetForCausalLM(BitNetConfig(**BITNET, hidden_act="relu"))
    phase = Phase(name="p", start=0, stop=1, l1=1.0, lr=1e-3, warmup=0, decay_from=1)
    module = SparsifyModule(model, phase)
    seen = []
    for layer in model.model.layers:
        layer.mlp.ffn_sub_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, l1_L, *_ = module._forward(torch.randint(3, 512, (2, 9)))
    assert l1_L.sum().item() == pytest.approx(sum(x1.abs().mean().item() for x1 in seen), rel=1e-5)
    assert len(seen) == 2
