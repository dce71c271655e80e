"""vLLM itself, with the plug-in, against transformers. `make test-vllm` runs this."""

from __future__ import annotations

import pytest
import torch
from vllm_reference import Reference

pytestmark = pytest.mark.vllm

FATRELU = {"hidden_act": "fatrelu", "hidden_act_param": 0.0741}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
PROSPARSE = {
    "model_type": "sparsellama",
    "architectures": ["SparseLlamaForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_sparsellama.SparseLlamaConfig"},
}


def check(made: dict, wanted: Reference) -> None:
    """Compare ids and log-probabilities; the latter where no gate was within rounding of T."""
    off = (torch.tensor(made["logprobs"]) - wanted.logprobs).abs()
    clear = wanted.margins > 3e-6
    assert made["ids"] == wanted.ids
    assert (off <= 1e-4)[clear].all()
    assert off.max() <= 0.05
    assert clear.double().mean() > 0.2
    assert (off <= 1e-4).double().mean() > 0.9
    assert len({tuple(row) for row in wanted.ids}) > 4


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("act", ["relu", "fatrelu", "drelu"])
def test_a_llama_is_served_as_its_config_says(variant, serve, reference, act, eager):
    folder = variant(act, hidden_act=act)
    made = serve(folder, enforce_eager=eager)
    check(made, reference(folder))
    assert "ACT_INFO" not in made["log"]


@pytest.mark.parametrize("act", ["drelu", "relu2"])
def test_a_mistral_is_served_as_its_config_says(variant, serve, reference, act):
    folder = variant(act, hidden_act=act, **MISTRAL)
    check(serve(folder, enforce_eager=True), reference(folder))


def test_prosparses_own_type_is_served_without_its_code(variant, serve, reference):
    folder = variant("sparsellama", **FATRELU, **PROSPARSE)
    (folder / "configuration_sparsellama.py").write_text("raise SystemExit('ran')")
    check(serve(folder, enforce_eager=True), reference(folder))


def test_act_info_overrides_the_config_and_its_compiled_graph(variant, serve, reference):
    """Both runs share a cache of compiled graphs, as all of a user's do."""
    config = variant("config", hidden_act="relu")
    made = serve(config, {"ACT_INFO": "fatrelu_0.2"})
    check(made, reference(variant("meant", hidden_act="fatrelu", hidden_act_param=0.2)))
    assert "config.json says relu, but ACT_INFO=fatrelu_0.2 is set" in made["log"]
    made = serve(config, {"ACT_INFO": "fatrelu_0.3"})
    check(made, reference(variant("other", hidden_act="fatrelu", hidden_act_param=0.3)))


def test_a_model_with_silu_is_vllms_own(variant, serve, reference):
    folder = variant("silu", hidden_act="silu")
    made, alone = (serve(folder, env, enforce_eager=True) for env in ({}, {"VLLM_PLUGINS": ""}))
    assert made["ids"] == alone["ids"]
    assert made["logprobs"] == alone["logprobs"]


def test_two_processes_share_the_neurons(variant, serve, reference):
    folder = variant("drelu", hidden_act="drelu")
    check(serve(folder, tensor_parallel_size=2, enforce_eager=True), reference(folder))


def test_exact_ffns_stay_dense_on_a_cpu_and_say_so(variant, serve, reference):
    folder = variant("fatrelu")
    made = serve(folder, additional_config={"sparse_ffn": "exact"}, enforce_eager=True)
    check(made, reference(folder))
    why = "the weights are on cpu, and the kernels need cuda"
    assert f"sparse_ffn is exact, but FFNs stay dense: {why}" in made["log"]
