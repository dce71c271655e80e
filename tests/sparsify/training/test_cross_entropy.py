"""The chunked loss is torch's own cross entropy, with its gradients, for every head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
)

from sparsecast.core.models.families import FAMILIES
from sparsecast.sparsify.training import cross_entropy
from sparsecast.sparsify.training.cross_entropy import IGNORED, Head, head_of, summed_nll

V, D = 23, 8
SIZES = {
    "hidden_size": D,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": V,
    "initializer_range": 0.5,
    "pad_token_id": None,
}
MODELS = {
    "untied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "scaled": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    "capped": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 1.5}),
    "nanochat": (NanoChatForCausalLM, NanoChatConfig, {"final_logit_softcapping": 2.0}),
}


@pytest.fixture(autouse=True, params=[1, 5 * V, 1 << 20], ids=["token", "5 tokens", "all"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", request.param)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_loss_and_gradients_of_its_own_logits(name):
    model_of, config_of, fields = MODELS[name]
    ours = model_of(config_of(**SIZES | fields)).double()
    oracle = copy.deepcopy(ours)
    ids_BS = torch.randint(V, (3, 9))
    target_BS = torch.where(torch.rand(3, 8) < 0.3, IGNORED, ids_BS[:, 1:])

    hidden_BSD = ours.base_model(ids_BS[:, :-1], use_cache=False).last_hidden_state
    found = summed_nll(hidden_BSD, head_of(ours), target_BS)
    (3 * found).backward()
    logits = oracle(ids_BS[:, :-1], use_cache=False).logits
    meant = nn.functional.cross_entropy(
        logits.flatten(0, 1), target_BS.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    (3 * meant).backward()

    torch.testing.assert_close(found, meant, rtol=0, atol=1e-6)
    for (where, mine), (_, its) in zip(
        ours.named_parameters(), oracle.named_parameters(), strict=True
    ):
        assert mine.grad.any(), where
        torch.testing.assert_close(mine.grad, its.grad, rtol=0, atol=1e-6, msg=where)


def test_without_any_target_there_is_no_loss_and_no_gradient():
    hidden_BSD = torch.randn(1, 4, D, requires_grad=True)
    weight_VD = torch.randn(V, D, requires_grad=True)

    loss = summed_nll(hidden_BSD, Head(weight_VD, 1.0, None), torch.full((1, 4), IGNORED))
    loss.backward()

    assert loss == 0
    assert not hidden_BSD.grad.any()
    assert not weight_VD.grad.any()


def test_under_autocast_products_are_in_bfloat16_and_the_softmax_is_not():
    """Logits of 60 and more, whose sum of exponentials bfloat16 cannot tell from its largest."""
    hidden_BSD = 20 * torch.randn(2, 7, D)
    weight_VD = torch.randn(V, D)
    target_BS = torch.randint(V, (2, 7))

    def run(loss_of):
        inputs = [value.clone().requires_grad_() for value in (hidden_BSD, weight_VD)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(*inputs)
        loss.backward()
        return loss, *(value.grad for value in inputs)

    def plain(h, w):
        logits = nn.functional.linear(h, w).flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, target_BS.flatten(), reduction="sum")

    found = run(lambda h, w: summed_nll(h, Head(w, 1.0, None), target_BS))
    meant = run(plain)

    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], meant[0], rtol=1e-6, atol=0)
    for mine, its in zip(found[1:], meant[1:], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, its, rtol=0.02, atol=0.02 * float(its.abs().max()))


class Largest(TorchDispatchMode):
    """The most elements that any operation's result has, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        tensors = [value for value in tree_leaves(found) if isinstance(value, torch.Tensor)]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return found


def test_no_tensor_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 5 * V)
    hidden_BSD = torch.randn(4, 25, 2, requires_grad=True)
    weight_VD = torch.randn(V, 2, requires_grad=True)

    with Largest() as largest:
        summed_nll(hidden_BSD, Head(weight_VD, 2.0, 3.0), torch.randint(V, (4, 25))).backward()

    assert largest.numel == max(5 * V, hidden_BSD.numel())
    assert largest.numel < 100 * V


def test_it_compiles_without_a_graph_break():
    hidden_BSD = torch.randn(2, 7, D, dtype=torch.float64)
    weight_VD = torch.randn(V, D, dtype=torch.float64)
    target_BS = torch.randint(V, (2, 7))

    def gradients(loss_of):
        inputs = [value.clone().requires_grad_() for value in (hidden_BSD, weight_VD)]
        loss = loss_of(*inputs)
        return loss, *torch.autograd.grad(loss, inputs)

    def loss_of(h, w):
        return summed_nll(h, Head(w, 1.0, 3.0), target_BS)

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)

    for mine, its in zip(gradients(compiled), gradients(loss_of), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if not family.experts])
def test_no_family_does_more_to_its_logits(name):
    own = {"ffn_dim": 16, "word_embed_proj_dim": 4, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {key: SIZES[key] for key in SIZES if (name, key) != ("falcon", "head_dim")}
    config = CONFIG_MAPPING[name](**sizes, **own)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).double().eval()
    ids_BS = torch.randint(V, (2, 6))

    hidden_BSD = model.base_model(ids_BS, use_cache=False).last_hidden_state
    found = summed_nll(hidden_BSD, head_of(model), ids_BS)

    logits = model(ids_BS, use_cache=False).logits.flatten(0, 1)
    meant = nn.functional.cross_entropy(logits, ids_BS.flatten(), reduction="sum")
    torch.testing.assert_close(found, meant)
