"""A target is met from any scale of gates, smoothly, and with a bound on perplexity it waits."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.loading import load_model, set_activation
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.sparsify import choose_threshold, phases
from sparsecast.sparsify.choose_threshold import meet_target
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.measure import Score, score
from sparsecast.sparsify.run import sparsify
from sparsecast.sparsify.training import fit
from sparsecast.sparsify.training.raised_threshold import (
    RAMP,
    SMOOTHING,
    UPDATE_STEPS,
    RaisedFATReLU,
    RaisedThreshold,
)

STEPS = 400


def test_the_activation_and_its_term_are_the_formulas():
    shared = RaisedThreshold(0.9, STEPS)
    shared.threshold.fill_(0.5)
    gate = torch.randn(5, 7, 11, dtype=torch.float64, requires_grad=True)
    shared.length = 7
    out = RaisedFATReLU(shared)(gate)
    below, gates_K = shared.take_record()

    g = gate.detach().numpy()
    assert np.array_equal(out.detach().numpy(), np.where(g >= 0.5, g, 0.0))
    cut = (g > 0) & (g < 0.5)
    assert below.item() == pytest.approx((g * cut).sum() / g.size / 0.5, rel=1e-6)
    (slope,) = torch.autograd.grad(below, gate)
    assert np.allclose(slope.numpy(), cut / g.size / 0.5, rtol=1e-6)
    assert gates_K.tolist() == pytest.approx(g[:, [2, 4]].ravel().tolist(), rel=1e-6)


class _Waits(TorchDispatchMode):
    """Note what makes a GPU wait: values that are read, and indices that come from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        self.found += {name} & {"aten::_local_scalar_dense", "aten::index", "aten::nonzero"}
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device():
    shared = RaisedThreshold(0.9, 20)
    activation, gate = RaisedFATReLU(shared), torch.randn(2, 16, 256, requires_grad=True)
    gates, zeros = torch.randn(1000), torch.tensor(0.5)
    shared.length = 16
    shared.ramp.fill_(0.5)
    with _Waits() as waits:
        activation(gate).sum().backward()
        shared.move(5, gates, zeros)
    assert waits.found == []
    with _Waits() as waits:
        gates[[1, 2]]
        gates[zeros.long()]
    assert waits.found == ["aten::index", "aten::_local_scalar_dense"]


def test_without_a_threshold_it_is_relu():
    shared = RaisedThreshold(0.9, STEPS)
    gate = torch.randn(3, 4, 5)
    assert torch.equal(RaisedFATReLU(shared)(gate), gate.relu())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("target", [0.8, 0.88, 0.95])
def test_the_target_is_reached_smoothly_at_every_scale(scale, target):
    """Gates drift and are sampled anew in every step, and up silences a tenth of the rest."""
    torch.manual_seed(0)
    shared = RaisedThreshold(target, STEPS)
    kept = torch.rand(50_000) > 0.1
    zeros, wanted = [], []
    for step in range(STEPS):
        gates_K = scale * (1 + step / STEPS) * (torch.randn(50_000) - 0.3)
        zero = 1 - ((gates_K >= shared.threshold) & (gates_K > 0) & kept).float().mean()
        shared.move(step, gates_K, zero)
        zeros.append(zero.item())
        wanted.append(shared.want.item())

    begun = zeros[shared.first]
    first, last = (round(share * STEPS) for share in RAMP)
    q = np.clip(
        (np.arange(first, STEPS, UPDATE_STEPS) - first + UPDATE_STEPS) / (last - first), 0, 1
    )
    formula = target - (target - begun) * (1 - q) ** 3
    assert wanted[first::UPDATE_STEPS] == pytest.approx(formula, abs=1e-4)
    assert np.mean(zeros[-20:]) == pytest.approx(target, abs=0.003)
    assert max(zeros) < target + 0.01  # no overshoot
    every = np.array(zeros[first:]).reshape(-1, 20).mean(1)
    assert all(later > sooner - 0.004 for sooner, later in pairwise(every))  # no oscillation


def test_the_threshold_is_a_quantile_and_moves_by_a_part_of_the_way():
    shared = RaisedThreshold(0.75, UPDATE_STEPS)  # the ramp is one move long
    gates_K = torch.randn(10_001)
    shared.move(UPDATE_STEPS, gates_K, torch.tensor(0.5))
    at = np.quantile(gates_K.numpy(), 0.75, method="lower")
    assert shared.threshold.item() == pytest.approx(at, rel=1e-6)
    shared.move(2 * UPDATE_STEPS, 3 * gates_K, torch.tensor(0.75))
    smoothed = SMOOTHING * at + (1 - SMOOTHING) * 3 * at
    assert shared.threshold.item() == pytest.approx(smoothed, rel=1e-6)


def test_a_threshold_that_is_not_needed_is_taken_away():
    shared = RaisedThreshold(0.5, UPDATE_STEPS)
    gates_K = torch.randn(1001) - 1  # 84 % below zero
    for move in range(1, 4):
        shared.move(UPDATE_STEPS * move, gates_K, torch.tensor(0.84))
        assert shared.want.item() == pytest.approx(0.5)  # denser than it is at the start
        assert shared.threshold == 0
        assert shared.correction == 0


def test_the_ramp_waits_while_sparsity_costs_too_much():
    shared = RaisedThreshold(0.9, STEPS)
    shared.affordable.fill_(0)
    for step in range(0, STEPS, UPDATE_STEPS):
        shared.move(step, torch.randn(1000), torch.tensor(0.5))
    assert shared.ramp == 0
    assert shared.want.item() == pytest.approx(0.5)
    shared.affordable.fill_(1)
    shared.move(STEPS, torch.randn(1000), torch.tensor(0.5))
    assert shared.ramp > 0


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=128,
        initializer_range=0.3,
        hidden_act="relu",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batches():
    ids_BS = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(2))
    return [TokenBatch("calibration", ids_BS, torch.ones_like(ids_BS, dtype=torch.bool))]


@pytest.mark.parametrize("target", [0.6, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("start", [1e-6, 0.3, 50.0])
def test_a_chosen_threshold_meets_the_target(random_model, batches, target, start):
    chosen, tried = meet_target(random_model, batches, target, start)
    set_activation(random_model, ActivationRule("fatrelu", chosen))
    assert score(random_model, batches).sparsity == pytest.approx(target, abs=0.003)
    assert chosen in dict(tried)
    assert len(tried) == len(dict(tried))


def test_a_training_that_ends_close_to_the_target_keeps_its_threshold(
    random_model, batches, monkeypatch
):
    def scored(model, _batches):
        threshold = model.model.layers[0].mlp.act_fn.threshold
        return Score(10.0, 0.8897 + 0.152 * threshold, (0.0,), (0,))

    monkeypatch.setattr(choose_threshold, "score", scored)
    chosen, tried = meet_target(random_model, batches, 0.9, 0.064)
    assert (chosen, [t for t, _ in tried]) == (0.064, [0.0, 0.064])


def test_a_threshold_that_was_doubled_has_three_digits(random_model, batches, monkeypatch):
    """1.134 would be saved as 1.13, which was not scored."""

    def scored(model, _batches):
        threshold = model.model.layers[0].mlp.act_fn.threshold
        return Score(10.0, 0.9 if threshold > 1 else 0.5, (0.0,), (0,))

    monkeypatch.setattr(choose_threshold, "score", scored)
    chosen, tried = meet_target(random_model, batches, 0.9, 0.567)
    assert (chosen, [t for t, _ in tried]) == (1.13, [0.0, 0.567, 1.13])


def test_relu_is_kept_where_it_is_sparse_enough(random_model, batches):
    chosen, tried = meet_target(random_model, batches, 0.3, 0.1)
    assert chosen == 0
    assert len(tried) == 1


def test_a_bound_gives_the_sparsest_threshold_within_it(random_model, batches, monkeypatch):
    """Perplexity grows with the threshold here, which a random model's does not."""

    def scored(model, _batches):
        threshold = model.model.layers[0].mlp.act_fn.threshold
        return Score(10 + threshold, min(1.0, threshold), (0.0,), (0,))

    monkeypatch.setattr(choose_threshold, "score", scored)
    chosen, tried = meet_target(random_model, batches, 0.9, 0.3, bound=10.4)
    assert chosen == pytest.approx(0.4, abs=0.01)
    assert chosen <= 0.4
    assert dict(tried)[chosen].perplexity <= 10.4
    assert len(tried) == len(dict(tried))
    assert meet_target(random_model, batches, 0.9, 0.3, bound=10.95)[0] == pytest.approx(0.9, 0.01)
    assert meet_target(random_model, batches, 0.9, 0.3, bound=9.0)[0] == 0


TRAINED = {
    "preset": "micro",
    "tokens": 3_840,
    "eval_tokens": 2_000,
    "lr": None,
    "pretrain_share": 0.2,
}


@pytest.mark.parametrize("target", [0.8, 0.9])
def test_a_trained_model_ends_at_its_target(options, target):
    out = sparsify(options(**TRAINED, target_sparsity=target))
    facts = json.loads((out / "sparsify.json").read_text())
    assert facts["held_out"]["as saved"]["sparsity"] == pytest.approx(target, abs=0.05)
    if facts["threshold"]:
        calibrated = {tried["threshold"]: tried["sparsity"] for tried in facts["calibration_sweep"]}
        assert calibrated[facts["threshold"]] == pytest.approx(target, abs=0.003)
    assert list(facts["held_out"]) == ["raised threshold", "as saved"]
    assert (facts["l1"], facts["shift_tolerance"]) == (None, None)


@pytest.mark.slow
def test_interrupted_it_ends_as_an_uninterrupted_run(options, monkeypatch, tmp_path):
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 7)
    changes = TRAINED | {"target_sparsity": 0.9, "max_perplexity_increase": 0.5}
    whole = sparsify(options(**changes, out=tmp_path / "whole"))
    step = fit.SparsifyModule.training_step

    def interrupted(self, batch, index):
        if self.raised is not None and self.global_step == 25:
            raise KeyboardInterrupt
        return step(self, batch, index)

    cfg = options(**changes, out=tmp_path / "parts")
    for place, broken in ((fit.SparsifyModule, "training_step"), (phases, "_scored")):
        with monkeypatch.context() as patched:
            patched.setattr(place, broken, interrupted if place is not phases else _stop)
            with pytest.raises(KeyboardInterrupt):
                sparsify(cfg)
    parts = sparsify(cfg)

    a, b = (json.loads((out / "sparsify.json").read_text()) for out in (whole, parts))
    assert a == b
    a, b = (load_model(str(out), device="cpu")[0].state_dict() for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_compiled_step_trains_what_the_eager_one_trains(dense, options, monkeypatch, tmp_path):
    """Autograd sees the buffers that a compiled graph keeps, such as the threshold."""
    changes = {"model": str(dense()), "target_sparsity": 0.9, "tokens": 1_280}
    eager = sparsify(options(**changes, out=tmp_path / "eager"))
    make = fit.SparsifyModule
    monkeypatch.setattr(
        fit, "SparsifyModule", lambda *args, **kw: make(*args, **kw | {"compile": True})
    )
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step: compiled(step, backend="aot_eager"))
    out = sparsify(options(**changes, out=tmp_path / "compiled"))

    a, b = (load_model(str(folder), device="cpu")[0].state_dict() for folder in (eager, out))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def test_parts_of_a_step_raise_the_threshold_of_the_whole(dense, options, monkeypatch, tmp_path):
    changes = {"model": str(dense("opt", "gelu")), "target_sparsity": 0.9, "tokens": 128 * 20}
    whole = sparsify(options(**changes, batch_tokens=128, out=tmp_path / "whole"))
    parts = sparsify(options(**changes, batch_tokens=128, micro_batch=3, out=tmp_path / "parts"))

    a, b = (json.loads((out / "sparsify.json").read_text()) for out in (whole, parts))
    for name in ("raised threshold", "as saved"):
        mine, its = a["held_out"][name], b["held_out"][name]
        assert mine["perplexity"] == pytest.approx(its["perplexity"], rel=1e-5)
        assert mine["sparsity"] == pytest.approx(its["sparsity"], abs=1e-4)


def _stop(*_args):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_with_baselines_prosparse_is_trained_too(options):
    out = sparsify(options(**TRAINED, target_sparsity=0.85, baselines=True))
    assert list(json.loads((out / "sparsify.json").read_text())["held_out"]) == [
        "SiLU original",
        "plain ReLU",
        "fixed L1",
        "ProSparse before the shift",
        "ProSparse after the shift",
        "raised threshold",
        "as saved",
    ]


def test_a_bound_that_cannot_be_kept_is_told(random_model, batches, caplog, monkeypatch):
    monkeypatch.setattr(choose_threshold.log, "propagate", True)
    plan = SimpleNamespace(target=0.9)
    rule = ActivationRule("relu")
    setup = SimpleNamespace(rule=rule, model=random_model, calibration=batches)

    chosen, _ = choose_threshold.choose_activation(plan, setup, phases.Trained({}, 0.1, 1.0))

    assert chosen == rule
    assert "above the bound of 1.000 even without a threshold" in caplog.text


def test_a_finished_model_of_the_other_recipe_is_not_taken(options, dense):
    """Both recipes have the same weight of the L1 term, given or by default."""
    model = str(dense())
    sparsify(options(model=model, l1=0.1))
    with pytest.raises(InputError, match=r"target_sparsity was None, now 0\.85"):
        sparsify(options(model=model, l1=None))


def test_a_model_without_a_threshold_is_refused(options, dense):
    model = str(dense("llama", "drelu"))
    with pytest.raises(InputError, match="its dReLU has no threshold .* give --l1"):
        sparsify(options(model=model, l1=None))
    kept = json.loads((sparsify(options(model=model, l1=0.1)) / "sparsify.json").read_text())
    assert kept["activation"] == "drelu"


def test_a_silenced_model_is_not_blamed_on_the_l1_term(options, dense, monkeypatch):
    silent = Score(9.0, 1.0, (1.0,), (32,))
    monkeypatch.setattr(phases, "score", lambda *_: silent)
    with pytest.raises(InputError, match=r"--lr 0.01: no neuron of raised .* a smaller --lr$"):
        sparsify(options(model=str(dense()), target_sparsity=0.9))


@pytest.mark.parametrize(("steps", "told"), [(UPDATE_STEPS, True), (UPDATE_STEPS + 1, False)])
def test_a_training_in_which_no_threshold_rises_is_told(
    options, dense, monkeypatch, caplog, steps, told
):
    monkeypatch.setattr(phases.log, "propagate", True)
    cfg = options(model=str(dense()), target_sparsity=0.9, tokens=64 * steps)
    thresholds = []
    move = RaisedThreshold.move

    def noted(self, *args):
        move(self, *args)
        thresholds.append(self.threshold.item())

    monkeypatch.setattr(RaisedThreshold, "move", noted)
    sparsify(cfg)
    assert any(thresholds) != told
    assert ("too few for the threshold to rise" in caplog.text) == told


@pytest.mark.parametrize(("scale", "found"), [(1e6, "inf"), (float("nan"), "nan")])
def test_a_start_without_a_perplexity_has_no_bound(options, dense, scale, found):
    folder = dense()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    cfg = options(model=str(folder), max_perplexity_increase=0.1)
    with pytest.raises(InputError, match=f"{folder}: its perplexity is {found}, expected a finite"):
        sparsify(cfg)
    assert not list(cfg.out.parent.glob("*out*"))


@pytest.mark.parametrize("target", [0, 1, -0.1, 1.5])
def test_a_target_is_a_share(tmp_path, target):
    with pytest.raises(InputError, match=r"--target-sparsity: must be in \(0, 1\)"):
        SparsifyConfig(model="m", out=tmp_path, target_sparsity=target)


def test_two_recipes_at_once_are_refused(tmp_path):
    with pytest.raises(InputError, match="--l1: is ProSparse's recipe"):
        SparsifyConfig(model="m", out=tmp_path, target_sparsity=0.8, l1=0.1)
    with pytest.raises(InputError, match="--l1: is ProSparse's recipe"):
        SparsifyConfig(model="m", out=tmp_path, max_perplexity_increase=0.1, l1=0.1)
    assert SparsifyConfig(model="m", out=tmp_path, l1=0.1).target is None
    assert SparsifyConfig(model="m", out=tmp_path).target == 0.85
