"""What a score says of every layer, against x1 kept by plain hooks and counted in float64."""

from __future__ import annotations

import pytest
import torch

from sparsecast.core.models.loading import load_model
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.sparsify.measure import score


@pytest.fixture
def model(dense):
    """Three ReLU layers; two neurons of the second and one of the third never fire."""
    made, _ = load_model(str(dense(act="relu", num_hidden_layers=3)), device="cpu", dtype="float32")
    with torch.no_grad():
        made.model.layers[1].mlp.up_proj.weight[[3, 17]] = 0
        made.model.layers[2].mlp.gate_proj.weight[5] = 0
    return made


def batches(lengths):
    """Batches of two texts, padded on the right with token 3."""
    made = []
    for pair in zip(lengths[::2], lengths[1::2], strict=True):
        keep = torch.arange(max(pair))[None] < torch.tensor(pair)[:, None]
        ids = torch.randint(4, 512, keep.shape)
        made.append(TokenBatch("held-out", torch.where(keep, ids, 3), keep))
    return made


def test_layers_are_counted_over_tokens_without_padding(model):
    data = batches([9, 5, 20, 2])
    x1 = [[] for _ in model.model.layers]
    for layer, kept in zip(model.model.layers, x1, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args))

    result = score(model, data)

    for layer, kept in enumerate(x1):
        rows = torch.cat([x[batch.keep_BS] for (x,), batch in zip(kept, data, strict=True)])
        assert len(rows) == 36
        zeros = (rows == 0).double()
        assert result.layer_sparsity[layer] == pytest.approx(zeros.mean().item(), abs=1e-12)
        assert result.dead_neurons[layer] == sum(bool(column.all()) for column in zeros.T)
    assert result.sparsity == pytest.approx(sum(result.layer_sparsity) / 3, abs=1e-12)
    assert result.dead_neurons[1] >= 2
    assert len(set(result.layer_sparsity)) == 3


def test_a_neuron_that_fires_on_padding_alone_is_dead(model):
    """Neurons that fire for token 3 alone: it is there as padding, then as text."""
    text = torch.tensor([[7, 8, 9], [7, 3, 3]])
    keep = torch.tensor([[True, True, True], [True, False, False]])

    padded = score(model, [TokenBatch("held-out", text, keep)])
    alone = score(model, [TokenBatch("held-out", text[:1], keep[:1])])
    read = score(model, [TokenBatch("held-out", text, torch.ones_like(keep))])

    assert padded.dead_neurons == alone.dead_neurons
    assert sum(read.dead_neurons) < sum(padded.dead_neurons)
