"""A step whose layers are compiled one by one is the eager step, and all layers share one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.loading import set_activation
from sparsecast.sparsify.phases import put_activation
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule
from sparsecast.sparsify.training.raised_threshold import RaisedFATReLU, RaisedThreshold
from tests.tools.dense_families import KINDS, random_model

LAYERS = 4
DTYPE = torch.float64


@pytest.fixture(autouse=True)
def _without_a_c_compiler(monkeypatch):
    """aot_eager traces as the real backend does, and runs torch's own operations."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step: real(step, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def two_steps(model, target, **options):
    """The loss and all gradients of a step, and of one at another threshold and learning rate."""
    raised = None if target is None else RaisedThreshold(target, 10).to(DTYPE)
    if raised is not None:
        put_activation(RaisedFATReLU(raised), model)
    phase = Phase(name="x", start=0, stop=4, l1=2.0, lr=1e-3, warmup=1, decay_from=3, stages=None)
    module = SparsifyModule(model, phase, raised=raised, **options)
    ids_BS = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for threshold in (0.01, 0.02):
        if raised is not None:
            raised.threshold.fill_(threshold)
        model.zero_grad()
        loss, measured = module.loss([ids_BS], torch.tensor(16.0), 1.0)
        loss.backward()
        found += [loss.detach(), measured, *(p.grad.clone() for p in model.parameters())]
    module.remove_hooks()
    return found


QUICK = ("llama", "opt", "smollm3")
MIXED = {"smollm3": 2}
"""Graphs of families whose layers differ: every fourth one of SmolLM3 rotates nothing."""


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("llama", None),
        *((kind, 0.9) for kind in QUICK),
        *(pytest.param(kind, 0.9, marks=pytest.mark.slow) for kind in KINDS if kind not in QUICK),
    ],
)
def test_it_trains_as_the_eager_step_from_one_graph(kind, target):
    model = random_model(kind, num_hidden_layers=LAYERS).to(DTYPE).eval()
    set_activation(model, ActivationRule("relu"))

    eager = two_steps(copy.deepcopy(model), target)
    assert not counters["stats"]
    compiled = two_steps(model, target, compile=True)

    for mine, its in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == MIXED.get(kind, 1)
    assert not counters["graph_break"]


def test_the_model_is_left_as_it_was():
    model = random_model("llama")
    before = [set(vars(module)) for module in model.modules()]
    phase = Phase(name="x", start=0, stop=1, l1=1.0, lr=1.0, warmup=1, decay_from=1)
    module = SparsifyModule(model, phase, compile=True)
    module.loss([torch.arange(9)[None]], torch.tensor(8.0), 1.0)[0].backward()
    module.remove_hooks()

    assert [set(vars(module)) for module in model.modules()] == before
