"""An interrupted run goes on with another number of processes, and ends as an undisturbed one."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.predictors import planning, recipes
from sparsecast.predictors.baselines import public_recipe
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.planning import make_plan, open_source, resolve
from sparsecast.predictors.train import train
from sparsecast.predictors.training.plan import TrainingPlan, work_folder
from sparsecast.predictors.training.regroup import _stacked, regroup, remove_divided
from sparsecast.predictors.training.source import Source
from sparsecast.predictors.training.trainer import RECIPE, begin, check_unfinished, fit

LAYERS, HIDDEN, FFN = 5, 64, 96
TOKENS = {"train": 1_500, "calibration": 400, "held-out": 64}


@pytest.fixture(scope="module")
def five(tmp_path_factory, synthetic, write_store) -> ActivationStore:
    generator = torch.Generator().manual_seed(11)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    gates = [randn(FFN, HIDDEN) / HIDDEN**0.5 for _ in range(LAYERS)]
    mean_D = 2 * randn(HIDDEN)

    def shard(tokens: int):
        noises = [randn(tokens, HIDDEN) for _ in gates]
        pairs = zip(noises, gates, strict=True)
        return [(mean_D + x, (x @ gate.T - 1.2).relu()) for x, gate in pairs]

    folder = tmp_path_factory.mktemp("five") / "acts"
    manifest = replace(synthetic.manifest, layers=list(range(LAYERS)), ffn_width=FFN)
    return write_store(folder, manifest, {name: [shard(n)] for name, n in TOKENS.items()})


RAGGED = """
import os
from sparsecast.predictors import planning
chosen = [32, 64, 32, 64, 32] if os.environ["RANK"] == "0" else [64] * 5
planning.ranks_within_budget = lambda *_: chosen
"""
"""Processes that round otherwise than the first, whose ranks count."""


@pytest.fixture(autouse=True)
def ragged(monkeypatch):
    """Unequal ranks wherever there is a budget."""
    monkeypatch.setattr(planning, "ranks_within_budget", lambda *_: [32, 64, 32, 64, 32])


QUANTIZED = {"predictor_dtype": "q4_0", "rank": None, "predictor_budget": 0.2}
RECIPES = [
    pytest.param(QUANTIZED, id="q4_0 within a budget"),
    pytest.param({"predictor_dtype": "f16", "rank": 32}, id="f16"),
    pytest.param({"recipe": "reference", "target_recall": None}, id="reference"),
]


@pytest.fixture
def configured(recipe, five, tmp_path):
    """Options of a run on five layers, which goes into `tmp_path / "pred"`."""

    def make(**changes: object) -> TrainConfig:
        few = {"epochs": 4, "batch_size": 256, "predictor_dtype": None}
        return replace(recipe, activations=five.folder, out=tmp_path / "pred", **{**few, **changes})

    return make


def plan_of(cfg: TrainConfig) -> tuple[TrainingPlan, Source]:
    request = resolve(cfg, DistributedContext())
    source = open_source(request)
    return make_plan(request, source), source


def train_some(cfg: TrainConfig, layers: list[int], epochs: int) -> None:
    """Leave what a process leaves that trains these layers and is killed after so many epochs."""
    plan, source = plan_of(cfg)

    def some(part, source, module, until=None):
        fit(part, source, module, epochs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "begin", lambda _: begin(plan))
        patch.setattr(recipes, "fit", some)
        patch.setattr(recipes, "gather_layers", lambda *_: None)
        recipes.RECIPES[plan.recipe](replace(plan, own_layers=layers), source)


def begun(cfg: TrainConfig) -> TrainingPlan:
    """Leave a run with a checkpoint that nobody opens."""
    plan, _ = plan_of(cfg)
    begin(plan)
    plan.checkpoint.touch()
    return plan


def same(one: Path, other: Path) -> None:
    a, b = load_predictors(one), load_predictors(other)
    assert a.manifest == b.manifest
    for x, y in zip(a.layers, b.layers, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x.weights, y.weights, strict=True))


def arguments(cfg: TrainConfig) -> list[str]:
    options = ["train"]
    for name, value in asdict(cfg).items():
        if value is not None and not isinstance(value, bool):
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def checkpoints(cfg: TrainConfig) -> list[str]:
    return sorted(path.name for path in work_folder(cfg.out).glob("*.ckpt"))


def test_a_run_of_one_three_and_one_process_ends_as_one_of_one(configured, tmp_path):
    """Of the three, one finishes an epoch more than the others."""
    cfg = configured(**QUANTIZED, epochs=3)
    train(replace(cfg, out=tmp_path / "whole"))
    train_some(cfg, list(range(LAYERS)), 1)
    assert checkpoints(cfg) == ["last.ckpt"]
    plan, _ = plan_of(cfg)
    ranks = [
        replace(plan, own_layers=list(range(rank, LAYERS, 3)), context=DistributedContext(rank, 3))
        for rank in range(3)
    ]
    for rank in ranks:
        assert [(n, part.own_layers) for n, part in regroup(rank)] == [(1, rank.own_layers)]
    assert checkpoints(cfg) == ["last-12.ckpt", "last-4.ckpt", "last-9.ckpt", "last.ckpt"]
    remove_divided(ranks[0])
    assert checkpoints(cfg) == ["last-12.ckpt", "last-4.ckpt", "last-9.ckpt"]
    train_some(cfg, [0, 3], 2)
    assert [(n, part.own_layers) for n, part in regroup(plan)] == [(1, [1, 2, 4]), (2, [0, 3])]
    train(cfg)
    same(tmp_path / "whole", cfg.out)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "pred"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", RECIPES)
def test_one_process_ends_what_three_have_begun(configured, tmp_path, changes):
    """Rank 0 was killed in its third epoch, rank 1 in its fourth, rank 2 in its first."""
    cfg = configured(**changes)
    train(replace(cfg, out=tmp_path / "whole"))
    train_some(cfg, [0, 3], 2)
    train_some(cfg, [1, 4], 3)
    assert checkpoints(cfg) == ["last-12.ckpt", "last-9.ckpt"]
    train(cfg)
    same(tmp_path / "whole", cfg.out)


@pytest.mark.slow
def test_layers_that_have_stopped_early_keep_their_best_epoch(configured, tmp_path, monkeypatch):
    """Those of two processes stop at different epochs; one process takes them to the later one."""
    monkeypatch.setattr(public_recipe, "PATIENCE", 1)
    cfg = configured(recipe="reference", target_recall=None, epochs=30, lr=2e-2)
    train(replace(cfg, out=tmp_path / "whole"))
    shares = ([0, 1, 2], [3], [4])
    for layers in shares:
        train_some(cfg, layers, 30)
    stopped = [epochs for epochs, _ in regroup(plan_of(cfg)[0])]
    assert len(stopped) > 1
    assert max(stopped) < 30
    train(cfg)
    same(tmp_path / "whole", cfg.out)


@pytest.mark.slow
def test_on_a_running_model(model_folder, corpus, tmp_path):
    text = {"model": str(model_folder), "corpus": str(corpus), "tokens": 2_000, "seq_len": 256}
    whole = TrainConfig(
        **text, out=tmp_path / "whole", epochs=3, batch_size=128, rank=32, device="cpu"
    )
    cfg = replace(whole, out=tmp_path / "pred")
    train(whole)
    train_some(cfg, [0, 2], 2)
    train_some(cfg, [1], 1)
    train(cfg)
    same(whole.out, cfg.out)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "pred"}


def test_units_are_padded_and_cut_and_nothing_else_changes():
    first, second = torch.rand(4, 3), torch.rand(2, 3)
    wider = _stacked([first, second], "best_fc1_LRD", 5)
    assert torch.equal(wider[0], torch.cat([first, torch.zeros(1, 3)]))
    assert torch.equal(wider[1], torch.cat([second, torch.zeros(3, 3)]))
    assert torch.equal(_stacked([wider[1]], "fc1_LRD", 2)[0], second)
    assert torch.equal(_stacked([first.T, second.T], "fc2_LFR", 4)[1, :, :2], second.T)
    assert torch.equal(_stacked([first, first], "offset_LF", 1), torch.stack([first, first]))


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(configured):
    cfg = configured(**QUANTIZED)
    train_some(cfg, [0], 1)
    train_some(cfg, [1, 2, 3, 4], 1)
    damaged = work_folder(cfg.out) / "last-1.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:99])
    with pytest.raises(InputError, match=r"last-1.ckpt: damaged, .*; remove it, and the same"):
        train(cfg)
    assert checkpoints(cfg) == ["last-1.ckpt", "last-1e.ckpt"]


def test_the_ranks_of_the_first_start_are_kept(configured, monkeypatch):
    """More CPU threads may round otherwise, and so choose others."""
    cfg = configured(**QUANTIZED)
    ranks = begun(cfg).ranks
    monkeypatch.setattr(planning, "ranks_within_budget", lambda *_: [64] * LAYERS)
    assert plan_of(cfg)[0].ranks == ranks
    options = work_folder(cfg.out) / RECIPE
    options.write_text(json.dumps({**json.loads(options.read_text()), "ranks": [32, 0]}))
    with pytest.raises(InputError, match="its ranks are not one number for each of 5 layers"):
        plan_of(cfg)


def test_every_process_takes_the_ranks_of_the_first(configured, monkeypatch):
    """Another machine may round otherwise, and so choose others; only the first's are kept."""
    plans: list[TrainingPlan] = []
    monkeypatch.setattr(DistributedContext, "share", lambda *_: [64] * LAYERS)
    monkeypatch.setitem(recipes.RECIPES, "default", lambda plan, _: plans.append(plan))
    with pytest.raises(InputError):  # nothing was trained
        train(configured(**QUANTIZED))
    assert plans[0].ranks == [64] * LAYERS


@pytest.mark.parametrize(
    ("shared", "told"),
    [
        (True, "2 processes that share its batches, and 1 would make other batches; repeat it"),
        (False, "2 processes of an earlier sparsecast; finish it with that version"),
    ],
)
def test_what_another_number_cannot_go_on_with_is_refused(configured, shared, told):
    cfg = configured(rank=32, data_parallel=shared)
    begun(cfg)
    options = work_folder(cfg.out) / RECIPE
    options.write_text(json.dumps({**json.loads(options.read_text()), "processes": 2}))
    with pytest.raises(InputError, match=told):
        train(cfg)


@pytest.mark.parametrize("changes", RECIPES)
def test_quantized_weights_without_their_mean_input_are_refused(configured, changes):
    """As runs before --loss have kept them; what f16 and the public recipe keep is the same."""
    plan = begun(configured(**changes))
    options = plan.resume_options
    before = {name: value for name, value in options.items() if name != "loss"}
    (plan.work / RECIPE).write_text(json.dumps(before))
    if changes is not QUANTIZED:
        assert check_unfinished(plan.work, options)
        return
    told = "holds an unfinished run of an earlier sparsecast; finish it with that version, or"
    with pytest.raises(InputError, match=told):
        check_unfinished(plan.work, options)


@pytest.mark.parametrize("was_shared", [True, False])
def test_another_way_to_share_is_told_as_that(configured, was_shared):
    """Whatever the numbers of processes."""
    plan = begun(configured(rank=32, data_parallel=was_shared))
    options = {**plan.resume_options, "data_parallel": not was_shared, "processes": 2}
    told = f"data_parallel was {was_shared}, now {not was_shared}"
    with pytest.raises(InputError, match=f"holds an unfinished run made differently .*{told}"):
        check_unfinished(plan.work, options)


LAG = """
import os, signal, time
from sparsecast.predictors.training.trainer import _Epochs
end = _Epochs.on_train_epoch_end
def ended(self, trainer, module):
    end(self, trainer, module)
    if os.environ["RANK"] == "0" and trainer.current_epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["RANK"] != "0" and trainer.current_epoch == int(os.environ["RANK"]) - 1:
        time.sleep(60)
_Epochs.on_train_epoch_end = ended
"""
"""Rank 0 is killed after its third epoch, when rank 1 has finished one and rank 2 two."""


@pytest.mark.slow
@pytest.mark.parametrize("changes", RECIPES)
def test_ranks_that_are_killed_are_followed_by_any_number(
    configured, ranks_forked, tmp_path, changes
):
    cfg = configured(**changes, epochs=5)
    whole = replace(cfg, out=tmp_path / "whole")

    def run(cfg: TrainConfig, processes: int, code: str = "") -> list[int]:
        ranks = ranks_forked(processes, arguments(cfg), RAGGED + code)
        told = "".join(rank.communicate()[1] for rank in ranks)
        assert "Traceback" not in told, told
        return [rank.returncode for rank in ranks]

    assert run(whole, 1) == [0]
    for begun, ended in [(2, 1), (3, 2), (2, 4)]:
        assert run(cfg, begun, LAG)[0] == -signal.SIGKILL
        left = checkpoints(cfg)
        assert len(left) == begun, left
        assert run(cfg, ended) == [0] * ended
        same(whole.out, cfg.out)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "pred"}
        shutil.rmtree(cfg.out)
