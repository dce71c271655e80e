"""What is forecast is what training then takes, and a forecast leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsecast.core import memory
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.sparsify import dry_run
from sparsecast.sparsify.dry_run import forecast
from sparsecast.sparsify.plan import make_plan
from sparsecast.sparsify.prepare import check_fits
from sparsecast.sparsify.run import sparsify
from sparsecast.sparsify.training.team import Team
from sparsecast.sparsify.work_folder import work_path


def plan_of(cfg, processes=1):
    return make_plan(cfg, Team(DistributedContext(0, processes)))


@pytest.mark.parametrize("tied", [True, False])
def test_what_stays_in_memory_is_the_sum_over_parameters(dense, options, tied):
    source = dense(num_hidden_layers=3, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(source)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad)]
    tensors += [t for state in optimizer.state.values() for t in state.values() if t.dim()]

    found = forecast(plan_of(options(model=str(source))))

    assert found.persistent == sum(tensor.nbytes for tensor in tensors)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.steps, found.tokens) == (4, 256)
    assert found.gathered == 0


def test_several_processes_share_it(dense, options):
    source = str(dense(num_hidden_layers=3))
    cfg = options(model=source, batch_tokens=128)

    one, four = forecast(plan_of(cfg)), forecast(plan_of(cfg, 4))

    assert four.persistent == one.persistent // 4
    assert four.activations < one.activations
    assert 0 < four.gathered < one.persistent
    assert four.disk == one.disk


def test_activations_of_two_layers_tell_those_of_all(dense, options, monkeypatch):
    cfg = options(model=str(dense(num_hidden_layers=4)), micro_batch=1)
    measure, measured = dry_run._measure, []

    def kept(*args):
        measured.append(measure(*args))
        return measured[-1]

    monkeypatch.setattr(dry_run, "_measure", kept)
    found = forecast(plan_of(cfg))
    plan = plan_of(cfg)
    whole = measure(plan, plan.checkpoint.config, 4, 1)

    assert found.activations == whole.saved
    assert found.activations > 4 * 32 * 16 * 4  # a hidden state per layer
    assert measured[0].at(4, measured[1]).parameters == whole.parameters == found.parameters


def test_a_compiled_run_is_measured_compiled(dense, options, monkeypatch):
    """Compiled layers keep less; aot_eager decides what as the real backend does."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step: real(step, backend="aot_eager"))
    plan = plan_of(options(model=str(dense()), micro_batch=1))

    eager, compiled = (forecast(replace(plan, compile=c)).activations for c in (False, True))

    assert 0 < compiled < eager


def test_smaller_passes_and_recomputed_layers_take_less(dense, options):
    source = str(dense(num_hidden_layers=4))

    plain, parts, again = (
        forecast(plan_of(options(model=source, **changes))).activations
        for changes in ({}, {"micro_batch": 1}, {"checkpoint_activations": True})
    )

    assert parts < plain
    assert again < plain


def test_a_raised_threshold_keeps_what_it_cuts(dense, options):
    source = str(dense(num_hidden_layers=4))

    without, target = (
        forecast(plan_of(options(model=source, **changes))).activations
        for changes in ({"l1": 0.1}, {"target_sparsity": 0.9})
    )

    gates = 4 * 2 * 31 * 32  # layers, sequences, tokens with a successor, neurons
    assert target >= without + gates  # at least a byte that says whether a gate fires


def test_nothing_is_written(dense, options, tmp_path, capsys):
    source = dense()
    before = sorted(tmp_path.rglob("*"))

    sparsify(options(model=str(source), dry_run=True))

    assert sorted(tmp_path.rglob("*")) == before
    told = " ".join(capsys.readouterr().err.split())
    assert "nothing is trained or written" in told
    assert "parameters 18,736" in told
    assert "weights, gradients, moments 300 kB" in told
    assert "measured on this device" in told


def test_a_micro_batch_that_does_not_fit_is_said(dense, options, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dry_run, "_measure", full)

    sparsify(options(model=str(dense()), dry_run=True))

    assert "choose a --micro-batch" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("dry", [False, True])
def test_more_state_than_memory_is_refused_before_text_is_read(dense, options, monkeypatch, dry):
    source = str(dense())
    needed = 16 * 18_736
    monkeypatch.setattr(memory, "host_limit", lambda: needed)
    check_fits(plan_of(options(model=source)), work_path(options(model=source).out))
    monkeypatch.setattr(memory, "host_limit", lambda: needed - 1)
    monkeypatch.setattr("sparsecast.sparsify.run.prepare", lambda *_: pytest.fail("text was read"))
    with pytest.raises(InputError, match="out: sparsify needs 300 kB of memory, but this process"):
        sparsify(options(model=source, dry_run=dry))
