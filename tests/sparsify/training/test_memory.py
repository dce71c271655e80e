"""Gradients added up over parts of a batch, and over recomputed activations, are the plain ones."""

from __future__ import annotations

import copy

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.loading import set_activation
from sparsecast.sparsify.sequences import Batches
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule

LAYERS, STEPS = 3, 3


@pytest.fixture
def model():
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    made = LlamaForCausalLM(config).double()
    set_activation(made, ActivationRule("relu"))
    return made


@pytest.fixture
def train(tmp_path, model):
    """Three steps of 6 sequences: (options of the module) to weights, logged values, forwards."""
    path = tmp_path / "tokens.uint16"
    np.random.default_rng(0).integers(64, size=200, dtype=np.uint16).tofile(path)

    def run(**options):
        ours = copy.deepcopy(model)
        logged, forwards = [], []
        for layer in ours.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda *_: forwards.append(1))
        phase = Phase(name="x", start=0, stop=STEPS, l1=2.0, lr=1e-3, warmup=1, decay_from=2)
        module = SparsifyModule(ours, phase, **options)
        module.log = lambda name, value, **_: logged.append((name, float(value)))
        trainer = L.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, DataLoader(Batches(path, 10, 6, seed=1), batch_size=None))
        module.remove_hooks()
        return ours, dict(logged), len(forwards)

    return run


@pytest.fixture(autouse=True)
def _regularized_from_the_first_step(monkeypatch):
    monkeypatch.setattr("sparsecast.sparsify.training.lightning_module.l1_share", lambda *_: 1.0)


def equal(a, b, atol):
    for (name, mine), other in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 6, 100])
def test_parts_of_a_batch_add_up_to_the_whole(train, model, micro_batch):
    """Also where the last part is smaller."""
    whole, logged, _ = train()
    parts, of_parts, _ = train(micro_batch=micro_batch)

    equal(parts, whole, 1e-6)
    assert of_parts == pytest.approx(logged, rel=1e-6)
    assert not torch.equal(whole.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_recomputed_layers_give_the_same_gradients_and_are_measured_once(train, micro_batch):
    plain, logged, forwards = train(micro_batch=micro_batch)
    again, of_again, twice = train(micro_batch=micro_batch, checkpoint_activations=True)

    equal(again, plain, 1e-9)
    assert of_again == logged
    assert twice == 2 * forwards
    assert "forward" not in vars(again.model.layers[0])


def test_the_l1_term_reaches_recomputed_layers(train, monkeypatch):
    with_l1, _, _ = train(checkpoint_activations=True)
    monkeypatch.setattr("sparsecast.sparsify.training.lightning_module.l1_share", lambda *_: 0.0)
    without, _, _ = train(checkpoint_activations=True)

    for one, other in zip(with_l1.model.layers, without.model.layers, strict=True):
        assert not torch.allclose(one.mlp.up_proj.weight, other.mlp.up_proj.weight, atol=1e-4)
