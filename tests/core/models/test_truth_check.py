"""Which activation fits the weights: on the model that ships, on random ones, on made-up scores."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import load_model, set_activation
from sparsecast.core.models.perplexity import perplexity
from sparsecast.core.models.recorder import Recorder
from sparsecast.core.models.truth_check import (
    Candidate,
    Score,
    TruthCheck,
    candidates,
    check_activation,
    score,
)
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import TokenBatch, token_batches
from tests.tools.mixtures import LAYERS, F, K, forward, write_mixture

RELU = ActivationRule("relu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Several processes of tests that share few cores wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(corpus):
    """The model that ships, and held-out text for it."""
    model, tokenizer = load_model("tiny-prosparse", device="cpu")
    documents = assign_splits(read_documents(str(corpus)))
    quota = {"held-out": 640}
    return model, list(token_batches(documents, tokenizer, quota, seq_len=320, batch_size=2))


def verdict_of(scored, name: str):
    rest = [each for other, each in scored.items() if other != name]
    return TruthCheck([scored[name], *rest], "config", 2048).verdict


def test_the_model_that_ships_without_its_threshold_under_a_wrong_name_and_as_it_is(tiny):
    model, batches = tiny
    own = activation_rule(model.config, "tiny")
    check = check_activation(model, batches, candidates(own, gated=True), vocabulary=2048)
    scored = {each.candidate.name: each for each in check.scores}
    assert check.verdict.kind == "fits"
    del scored[str(own)]  # the grid has thresholds of its own

    verdict = verdict_of(scored, "relu")
    assert verdict.kind == "threshold"
    assert verdict.best in ("fatrelu(0.05)", "fatrelu(0.07)", "fatrelu(0.1)")
    found, relu = scored[verdict.best], scored["relu"]
    assert f"config says relu; {verdict.best} fits better" in verdict.text
    assert f"perplexity {found.perplexity:.4g} against {relu.perplexity:.4g}" in verdict.text

    for name in ("silu", "relu2", "drelu"):
        verdict = verdict_of(scored, name)
        assert (verdict.kind, verdict.best) == ("wrong", "relu")
        assert verdict.text.startswith(f"config says {name}; relu fits better: perplexity")
        assert "fatrelu(0.0" in verdict.text


def test_a_relu_model_is_not_said_to_have_a_threshold(tiny):
    """Larger gates and smaller ups: the same ReLU model, in which published thresholds do
    nothing."""
    batches = tiny[1]
    model, _ = load_model("tiny-prosparse", device="cpu")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(64)
            layer.mlp.up_proj.weight.div_(64)
    tried = [each for each in candidates(RELU, gated=True) if each.name not in ("silu", "drelu")]
    check = check_activation(model, batches, tried[:3] + tried[-1:], vocabulary=2048)
    assert check.scores[-1].candidate.name == "fatrelu(0.1)"
    assert check.verdict.kind == "fits"


@pytest.mark.parametrize("own", ["silu", RELU, ActivationRule("fatrelu", 0.03)])
def test_nothing_is_said_of_a_model_that_was_never_trained(own, tiny):
    torch.manual_seed(2)
    sizes = {"hidden_size": 64, "intermediate_size": 136, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=2048, hidden_act="silu")
    model = LlamaForCausalLM(config).eval()
    check = check_activation(model, tiny[1], candidates(own, gated=True), vocabulary=2048)
    assert (check.verdict.kind, check.verdict.best) == ("unknown", None)
    assert "no better than chance" in check.verdict.text
    assert len(check.scores) == 4 + (own == ActivationRule("fatrelu", 0.03))  # no thresholds tried


def made_up(name: str, gain: float, noise: float, active: float) -> Score:
    """An activation whose NLL is `gain` below 2 nats, give or take `noise` from block to block."""
    made = torch.Generator().manual_seed(sum(map(ord, name)))
    nll = torch.full((1024,), 2 - gain, dtype=torch.float64)
    jitter = torch.randn(32, generator=made, dtype=torch.float64)
    jitter = (jitter - jitter.mean()) / jitter.std() * noise * math.sqrt(32)
    threshold = float(name[8:-1]) if name.startswith("fatrelu") else None
    rule = ActivationRule("fatrelu", threshold) if threshold else RELU
    candidate = replace(Candidate.of(rule), name=name)
    return Score(candidate, nll + jitter.repeat_interleave(32), [1 - active])


@pytest.mark.parametrize(
    ("own", "other", "kind"),
    [
        # Trained with its threshold: a few percent better, though little falls silent.
        (("relu", 0, 0, 0.3), ("fatrelu(0.03)", 0.02, 0.002, 0.295), "wrong"),
        # The same gain within noise.
        (("relu", 0, 0, 0.3), ("fatrelu(0.03)", 0.02, 0.01, 0.295), "fits"),
        # Beyond noise, but too little to matter.
        (("relu", 0, 0, 0.3), ("relu2", 0.004, 0.0001, 0.3), "fits"),
        # What sparsity costs.
        (("fatrelu(0.03)", 0, 0, 0.2), ("relu", 0.015, 0.001, 0.3), "fits"),
        (("fatrelu(0.03)", 0, 0, 0.2), ("relu", 0.03, 0.001, 0.3), "wrong"),
        # A threshold that costs nothing, one that may cost something, one that does nothing.
        (("relu", 0, 0, 0.3), ("fatrelu(0.03)", -0.001, 0.001, 0.27), "threshold"),
        (("relu", 0, 0, 0.3), ("fatrelu(0.03)", -0.001, 0.003, 0.27), "fits"),
        (("relu", 0, 0, 0.3), ("fatrelu(0.03)", -0.001, 0.001, 0.29), "fits"),
        (("relu", 0, 0, 0.0), ("fatrelu(0.03)", 0, 0, 0.0), "fits"),
    ],
)
def test_the_rules_at_their_edges(own, other, kind):
    verdict = TruthCheck([made_up(*own), made_up(*other)], "config", 2048).verdict
    assert verdict.kind == kind
    assert verdict.best == (None if kind == "fits" else other[0])


def test_an_activation_that_overflows_is_the_worst():
    broken = replace(made_up("relu2", 0, 0, 0.3), nll_T=torch.full((1024,), torch.nan))
    fine = made_up("relu", 0, 0, 0.3)
    assert TruthCheck([fine, broken], "config", 2048).verdict.kind == "fits"
    assert TruthCheck([broken, fine], "config", 2048).verdict.best == "relu"


def test_too_few_tokens_say_nothing():
    few = [replace(made_up(n, g, 0, 0.3), nll_T=torch.full((200,), 2.0 - g)) for n, g in
           (("relu", 0), ("silu", 1))]  # fmt: skip
    assert "200 tokens are too few" in TruthCheck(few, "config", 2048).verdict.text


@pytest.mark.parametrize("name", ["llama-fatrelu", "opt", "falcon-40b", "bamboo", "minicpm"])
def test_a_score_is_what_the_model_itself_gives(name, family_folder):
    """Perplexity and zeros, where the model's own forward pass has that activation; and whatever is
    tried, the model is as before afterwards."""
    model, _ = load_model(str(family_folder(name)), device="cpu")
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1, 25:] = False
    batch = TokenBatch("held-out", torch.randint(3, 512, (2, 40)) * keep, keep)
    zeros: list[float] = []

    def count(_: int, __: torch.Tensor, x1_NF: torch.Tensor) -> None:
        zeros.append((x1_NF[keep.flatten()] == 0).double().mean().item())

    with torch.inference_mode():
        before = model(batch.ids_BS).logits
        with Recorder(model, count):
            model(batch.ids_BS)
    rule = activation_rule(model.config, name)
    found = score(model, [batch], Candidate.of(rule))
    assert found.perplexity == pytest.approx(perplexity(model, [batch]), rel=1e-5)
    assert found.zeros == pytest.approx(zeros, abs=1e-9)

    other = score(model, [batch], Candidate("silu", torch.nn.SiLU()))
    assert other.active > 0.99
    with torch.inference_mode():
        assert torch.equal(model(batch.ids_BS).logits, before)

    relu = score(model, [batch], Candidate.of(RELU))
    if not rule.on_up:  # dReLU's hook on up stays, so the model itself cannot show plain ReLU
        set_activation(model, RELU)
        assert relu.perplexity == pytest.approx(perplexity(model, [batch]), rel=1e-5)
    else:
        assert relu.active > found.active


def test_ungated_models_are_compared_with_what_they_may_have(family_folder):
    model, _ = load_model(str(family_folder("opt")), device="cpu")
    assert family_of(model.config, "opt").gate is None
    assert [each.name for each in candidates(RELU, gated=False)] == ["relu", "gelu", "relu2"]


@pytest.mark.parametrize("name", ["mixtral", "turbosparse", "smallthinker"])
def test_a_mixture_is_scored_as_its_forward_pass_by_hand(name, tmp_path, model_folder):
    folder = write_mixture(tmp_path / "m", name, model_folder)
    model, _ = load_model(str(folder), device="cpu")
    rule = activation_rule(model.config, name)
    ids_BS = torch.randint(3, 512, (2, 24))
    keep_BS = torch.ones(2, 24, dtype=torch.bool)
    keep_BS[1, 15:] = False
    batch = TokenBatch("held-out", ids_BS, keep_BS)
    with torch.inference_mode():
        before = model(ids_BS).logits
    scored = {
        each.name: score(model, [batch], each)
        for each in candidates(rule, gated=True, thresholds=(0.05,))
    }
    with torch.inference_mode():
        assert torch.equal(model(ids_BS).logits, before)
    nll, zeros = [], [0.0] * LAYERS
    for ids in (ids_BS[0].tolist(), ids_BS[1, :15].tolist()):
        logits, layers = forward(folder, ids)
        nll.append(-logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]])
        zeros = [
            n + (layer.x1_TkF == 0).sum().item() for n, layer in zip(zeros, layers, strict=True)
        ]
    own = scored[str(rule)]
    torch.testing.assert_close(own.nll_T, torch.cat(nll), rtol=1e-3, atol=1e-3)
    assert own.zeros == pytest.approx([n / (39 * K * F) for n in zeros], abs=2e-3)
    assert scored["silu"].active == pytest.approx(1, abs=1e-3)
    assert scored["relu"].active == pytest.approx(scored["relu2"].active, abs=0.05)
    assert scored["drelu"].active < scored["relu"].active - 0.1
    assert scored["fatrelu(0.05)"].active < scored["relu"].active
    assert scored["relu"].nll != scored["relu2"].nll != scored["silu"].nll


def test_a_model_of_nans_overflows():
    bad = torch.full((600,), math.nan, dtype=torch.float64)
    scores = [Score(each, bad, [0.5]) for each in candidates(RELU, gated=True)]
    verdict = TruthCheck(scores, "config", 2048).verdict
    assert (verdict.kind, verdict.best) == ("unknown", None)
    assert "the model overflows with every activation" in verdict.text
